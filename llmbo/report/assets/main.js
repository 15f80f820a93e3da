"use strict";
/* The state of the page, the controls that change it, and the keys. */

const STATE = { x: "", y: "", size: "", over: "evaluations", everything: false, selected: null, limit: null, format: DATA.formats[0].name, quantity: "", run: 0 };
const current = (state) => RUNS[BY_KEY.get(state.selected)?.run ?? 0];

/** Change the state and redraw what depends on what changed. */
function update(changes) {
  const before = { ...STATE };
  Object.assign(STATE, changes);
  const changed = (...names) => names.some((name) => before[name] !== STATE[name]);
  if (changed("x", "y", "size", "everything", "selected", "limit")) drawFront(STATE);
  if (changed("selected", "format")) drawTrial(STATE);
  if (changed("selected", "x", "y")) announce(STATE);
  if (changed("over")) drawHypervolume(STATE);
  if (MANY && changed("selected") && BY_KEY.get(before.selected)?.run !== BY_KEY.get(STATE.selected)?.run) drawParts();
}

function drawParts() {
  for (const draw of [drawSamples, drawImportance, drawRecipes, drawCost, drawAdvisor, drawRecipe]) draw(STATE);
  for (const node of document.querySelectorAll(".of-run")) node.textContent = MANY ? ` of ${current(STATE).label}` : "";
}

function drawEverything() {
  drawFront(STATE);
  drawTrial(STATE);
  drawHypervolume(STATE);
}

/** The best quality among the trials that may be on a front, within the limit. */
function bestWithin(name, limit) {
  const sign = maximized(QUALITY) ? -1 : 1;
  const fitting = TRIALS.filter((entry) => entry.number !== "dense" && entry.counts && entry.values?.[name] <= limit * (1 + 1e-9));
  return fitting.reduce((best, entry) => (best && sign * best.values[QUALITY] <= sign * entry.values[QUALITY] ? best : entry), null);
}

function applyLimit(name, limit) {
  const answer = document.getElementById("budget-answer");
  const best = bestWithin(name, limit);
  if (!best) {
    const sizes = TRIALS.filter((entry) => entry.counts).map((entry) => entry.values?.[name]).filter(Number.isFinite);
    answer.textContent = `No trial is that small: the smallest has ${sizes.length ? format(name, Math.min(...sizes)) : "no value"}.`;
    update({ limit: { name, value: limit } });
    return;
  }
  const seen = typeof best.heldout?.[QUALITY] === "number" ? ` (held-out ${format(QUALITY, best.heldout[QUALITY])})` : "";
  answer.textContent = `${nameOf(best)}: ${words(name)} ${withUnit(name, best.values[name])}, ${words(QUALITY)} ${format(QUALITY, best.values[QUALITY])}${seen}`;
  update({ limit: { name, value: limit }, selected: best.key });
}

function setUpBudget() {
  const [field, slider, quantity] = ["budget", "budget-slider", "budget-quantity"].map((id) => document.getElementById(id));
  const sizes = QUANTITIES.filter((name) => !isQuality(name) && !maximized(name));
  quantity.append(...sizes.map((name) => el("option", { value: name }, unitOf(name) && unitOf(name) !== name ? `${words(name)} (${unitOf(name)})` : words(name))));
  const range = () => {
    const values = TRIALS.map((entry) => entry.values?.[quantity.value]).filter(Number.isFinite);
    return values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  };
  const reset = () => {
    [slider.value, field.value] = ["1000", ""];
    field.placeholder = format(quantity.value, range()[1]);
    document.getElementById("budget-answer").textContent = "";
    update({ limit: null });
  };
  slider.addEventListener("input", () => {
    const [low, high] = range();
    const limit = low + ((high - low) * Number(slider.value)) / 1000;
    field.value = format(quantity.value, limit);
    applyLimit(quantity.value, limit);
  });
  field.addEventListener("input", () => {
    const limit = parseAmount(quantity.value, field.value);
    field.setAttribute("aria-invalid", String(field.value.trim() !== "" && Number.isNaN(limit)));
    if (field.value.trim() === "") return reset();
    if (Number.isNaN(limit)) {
      document.getElementById("budget-answer").textContent = "Type a number, for example 100M, 60 % or 250 MB.";
      return undefined;
    }
    const [low, high] = range();
    slider.value = String(Math.round((1000 * (limit - low)) / (high - low || 1)));
    return applyLimit(quantity.value, limit);
  });
  quantity.addEventListener("change", reset);
  if (sizes.length) reset();
  document.getElementById("budget-form").addEventListener("submit", (event) => event.preventDefault());
}

function setUpAxes() {
  for (const [id, side] of [["x-axis", "x"], ["y-axis", "y"], ["mark-size", "size"]]) {
    const select = document.getElementById(id);
    select.append(...QUANTITIES.map((name) => el("option", { value: name, selected: name === STATE[side] }, words(name))));
    select.addEventListener("change", () => update({ [side]: select.value }));
  }
  document.getElementById("everything").addEventListener("change", (event) => update({ everything: event.target.checked }));
  document.getElementById("over").addEventListener("change", (event) => update({ over: event.target.value }));
}

/** Left and right walk along the front by size, up and down through all trials by number. */
function setUpKeys() {
  const byNumber = TRIALS.filter((entry) => entry.values);
  const walk = (list, step) => {
    const at = list.findIndex((entry) => entry.key === STATE.selected);
    const next = at < 0 ? 0 : Math.min(list.length - 1, Math.max(0, at + step));
    if (list.length) update({ selected: list[next].key });
  };
  const front = () => staircase(byNumber.filter((entry) => entry.counts && STATE.x in entry.values && STATE.y in entry.values), STATE.x, STATE.y);
  const keys = {
    ArrowRight: () => walk(front(), 1), ArrowLeft: () => walk(front(), -1), ArrowDown: () => walk(byNumber, 1), ArrowUp: () => walk(byNumber, -1),
    Home: () => walk(front(), -Infinity), End: () => walk(front(), Infinity),
  };
  document.getElementById("front-chart").addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
}

function start() {
  const [size, third] = OBJECTIVES.map((one) => one.name).filter((name) => name !== QUALITY);
  const x = size ?? QUALITY;
  const front = TRIALS.filter((entry) => entry.onFront && entry.values).sort((a, b) => a.values[x] - b.values[x]);
  Object.assign(STATE, { x, y: QUALITY, size: third ?? "", selected: (front[Math.floor(front.length / 2)] ?? TRIALS[0]).key });
  setUpAxes();
  setUpBudget();
  setUpKeys();
  drawConstraints();
  drawNoise();
  drawRuns();
  drawParts();
  drawTrials(STATE);
  document.getElementById("all-trials").addEventListener("toggle", () => drawTrials(STATE));
  drawEverything();
  chart("front-chart").on("click", (item) => item.data?.key && update({ selected: item.data.key }));
  chart("hypervolume-chart").on("click", (item) => item.data?.key && update({ selected: item.data.key }));
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      Object.values(CHARTS).forEach((drawn) => drawn.resize());
      drawTrial(STATE);
    });
  });
  DARK.addEventListener("change", () => { drawEverything(); drawRecipes(STATE); });
  document.documentElement.dataset.ready = "yes";
}

start();
