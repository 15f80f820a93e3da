"use strict";
/* The data of the page, and how its values are named, written and coloured. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const MANY = RUNS.length > 1;

// Okabe and Ito's palette tells apart under every common colour blindness; shapes say the same to those who see none.
const PALETTES = {
  light: ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F2A"],
  dark: ["#4FA3DC", "#F0B429", "#2BC79A", "#E39CC3", "#A5DCFA", "#FF8A4C", "#C7C766"],
};
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const color = (index) => PALETTES[DARK.matches ? "dark" : "light"][index % PALETTES.light.length];
const SYMBOLS = ["circle", "rect", "diamond", "triangle", "pin", "arrow", "roundRect"];
/** What Python knows of each quantity: unit, format, maximize, measured, brief. */
const ABOUT = new Map(Object.entries(DATA.quantities));
const QUALITY = DATA.quality;

/** Every trial of every run, the dense models included, in one list: {key, run, number, trial, values, heldout, elsewhere, onFront, counts}. */
const TRIALS = RUNS.flatMap((run, index) => {
  const front = new Map(run.report.front.map((point) => [point.trial, point]));
  const dense = { ...run.report.dense, origin: "dense", state: "complete" };
  const all = [{ number: "dense", trial: dense, counts: true }, ...run.report.trials.map((trial, at) => ({ number: trial.number, trial, counts: run.counts[at] }))];
  return all.map(({ number, trial, counts }) => ({
    key: `${index}:${number}`,
    run: index,
    number,
    trial,
    values: valuesOf(trial, number === "dense" ? dense : front.get(number)),
    heldout: (number === "dense" ? dense.heldout : front.get(number)?.heldout) ?? null,
    elsewhere: (number === "dense" ? dense.elsewhere : front.get(number)?.elsewhere) ?? null,
    onFront: front.has(number),
    counts, // whether it may be on a front
  }));
});
const BY_KEY = new Map(TRIALS.map((entry) => [entry.key, entry]));
const ORIGINS = [...new Set(TRIALS.filter((entry) => entry.number !== "dense").map((entry) => entry.trial.origin))].sort();
const OBJECTIVES = RUNS[0].report.objectives;
const CONSTRAINTS = [...new Map(RUNS.flatMap((run) => run.report.constraints ?? []).map((bound) => [`${bound.name}:${bound.maximum}`, bound])).values()];
const QUANTITIES = [...new Set(TRIALS.flatMap((entry) => Object.keys(entry.values ?? {})))];

function valuesOf(trial, point) {
  if (!trial.objectives) return null;
  const numbers = Object.entries({ ...trial.objectives, gain: trial.gain, ...itemsOf(point) }).filter(([, value]) => typeof value === "number");
  return Object.fromEntries(numbers);
}

/** What a point of the front got right of each file of items: {"arc_easy acc_norm": 0.45}. */
function itemsOf(point) {
  return Object.fromEntries(Object.entries(point?.items ?? {}).flatMap(([file, scores]) =>
    Object.entries(scores).filter(([metric]) => !metric.endsWith("_stderr")).map(([metric, value]) => [`${file} ${metric}`, value])));
}

/** The point of the front that an entry is; the dense model is one, too. */
const pointOf = (entry) => (entry.number === "dense" ? RUNS[entry.run].report.dense : RUNS[entry.run].report.front.find((point) => point.trial === entry.number));
/** What chance of the windows leaves open of a value, by default of a held-out one, as "± 0.012"; empty where it is not known. */
const plusMinus = (entry, name, noise = pointOf(entry)?.noise) => {
  const half = noise?.[name];
  return ["kl", "loss"].includes(name) && typeof half === "number" ? `± ${format(name, Number(half.toPrecision(2)))}` : "";
};
const maximized = (name) => ABOUT.get(name)?.maximize ?? false;
const unitOf = (name) => ABOUT.get(name)?.unit ?? "";
const formatOf = (name) => ABOUT.get(name)?.format ?? "plain";
const isQuality = (name) => ABOUT.get(name)?.measured ?? false;
const colorOf = (entry) => color(MANY ? entry.run : ORIGINS.indexOf(entry.trial.origin));
const symbolOf = (entry) => SYMBOLS[ORIGINS.indexOf(entry.trial.origin) % SYMBOLS.length];
const nameOf = (entry) => `${MANY ? `${RUNS[entry.run].label}, ` : ""}${entry.number === "dense" ? "dense model" : `trial ${entry.number}`}`;
/** How far its measurement came, in words. */
const stateOf = (entry) => `${entry.trial.state}${entry.trial.feasible === false ? ", infeasible" : ""}${"error" in (entry.values ?? {}) ? ", lost its race: values are estimates" : ""}${entry.trial.failure ? `: ${entry.trial.failure}` : ""}`;
/** Why the advisor proposed it, if it said so. */
const reasonOf = (entry) => (typeof entry.trial.why === "string" ? entry.trial.why : "");
/** The constraints that a trial breaks, in words. */
const broken = (entry) => (RUNS[entry.run].report.constraints ?? [])
  .filter((bound) => entry.trial.feasible === false && entry.values?.[bound.name] > bound.maximum)
  .map((bound) => `${words(bound.name)} ${format(bound.name, entry.values[bound.name])} > ${format(bound.name, bound.maximum)}`);

const SCALES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

function scaled(value, unit) {
  const [factor, suffix] = SCALES.find(([limit]) => Math.abs(value) >= limit) ?? [1, ""];
  const digits = Math.abs(value / factor) >= 100 || factor === 1 ? 1 : 2;
  return `${Number((value / factor).toFixed(digits))}${suffix || unit ? " " : ""}${suffix}${unit}`.trim();
}

/** A value of the quantity `name` as people write it. */
function format(name, value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (formatOf(name) === "share") return `${(100 * value).toFixed(1)} %`;
  if (formatOf(name) === "bytes") return scaled(value, "B");
  if (Math.abs(value) >= 1e4) return scaled(value, "");
  return Number.isInteger(value) ? String(value) : Number(value.toPrecision(4)).toString();
}

/** The same with its unit, where that says more than the value and its name do. */
function withUnit(name, value) {
  const unit = formatOf(name) === "plain" && unitOf(name) !== name ? unitOf(name) : "";
  return unit ? `${format(name, value)} ${unit}` : format(name, value);
}

/** What somebody typed as a value of `name`, as a number: "100M", "1.2 GB", "60 %", "90 000 000", "25 ms"; NaN for anything else. */
function parseAmount(name, text) {
  const unit = unitOf(name).split("/")[0].toLowerCase();
  const typed = text.trim().toLowerCase();
  const bare = unit && typed.endsWith(unit) ? typed.slice(0, -unit.length) : typed;
  const match = /^([0-9][0-9\s_']*(?:[.,][0-9]+)?|[.,][0-9]+)\s*(k|m|g|t|bn?|%)?i?b?\s*$/.exec(bare);
  if (!match) return NaN;
  const factor = { k: 1e3, m: 1e6, g: 1e9, b: 1e9, bn: 1e9, t: 1e12, "%": 0.01 }[match[2]] ?? 1;
  return Number(match[1].replace(/[\s_']/g, "").replace(",", ".")) * factor;
}

/** An element; `children` are nodes or text, and text stays text. */
function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function table(headings, rows, caption) {
  const prose = headings.map((_, column) => rows.some((row) => typeof row[column] === "string" && row[column].length > 24));
  const kind = (column) => ({ class: prose[column] ? "prose" : null });
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {},
      el("caption", { class: "hidden" }, caption),
      el("thead", {}, el("tr", {}, ...headings.map((heading, column) => el("th", { scope: "col", ...kind(column) }, heading)))),
      el("tbody", {}, ...rows.map(([first, ...rest]) =>
        el("tr", {}, el("th", { scope: "row" }, first), ...rest.map((cell, at) => el("td", kind(at + 1), cell)))))));
}

/** Any JSON value as lists and tables: parts of the report that this page does not know by name are shown all the same. */
function anything(value, caption = "") {
  if (Array.isArray(value)) {
    if (!value.length) return "none";
    if (!value.every(isPlainObject)) return value.map((item) => (item !== null && typeof item === "object" ? JSON.stringify(item) : plain(item))).join(", ");
    return records(value.map((row) => flat(row)), caption);
  }
  if (!isPlainObject(value)) return plain(value);
  const parts = Object.entries(value);
  if (!parts.length) return "none";
  if (parts.every(([, part]) => isPlainObject(part))) return records(parts.map(([name, part]) => ({ "": words(name), ...flat(part) })), caption);
  return el("dl", {}, ...parts.flatMap(([key, part]) => [el("dt", {}, words(key)), el("dd", {}, anything(part, words(key)))]));
}

function records(rows, caption) {
  const keys = [...new Set(rows.flatMap(Object.keys))];
  return table(keys.map(words), rows.map((row) => keys.map((key) => (key === "cost" && row[key] === null ? "unknown" : anything(row[key], words(key))))), caption);
}

/** Objects inside a row become columns of their own. */
const flat = (row) => Object.fromEntries(Object.entries(row).flatMap(([key, part]) => (isPlainObject(part) ? Object.entries(part) : [[key, part]])));

const isPlainObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const words = (key) => String(key).replaceAll("_", " ");

function plain(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(5)).toString() : String(value);
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
