"use strict";
/* Everything below the charts: runs, importance, cost, advisor, trials, recipe. */

function fill(id, ...content) {
  const section = document.getElementById(id);
  const shown = content.filter(Boolean);
  section.hidden = !shown.length;
  section.querySelector(".body").replaceChildren(...shown);
}

function drawConstraints() {
  const line = document.getElementById("constraints");
  const bounds = CONSTRAINTS.map(({ name, maximum }) => `${words(name)} ≤ ${withUnit(name, maximum)}`);
  const failed = TRIALS.filter((entry) => entry.trial.feasible === false).length;
  line.hidden = !bounds.length;
  const outcome = failed ? `${failed} of ${TRIALS.length - RUNS.length} trials break one: dashed marks, never on the front` : "every trial keeps them";
  line.textContent = `Constraints: ${bounds.join(", ")}; ${outcome}. Shaded: what is forbidden.`;
}

/** Points of the front that may be no better than the next smaller one. */
function drawNoise() {
  const line = document.getElementById("noise");
  const told = RUNS.flatMap((run, index) => run.report.front.slice(1).map((point, at) => [BY_KEY.get(`${index}:${point.trial}`), point.noise, run.report.front[at].trial]))
    .filter(([, noise]) => noise);
  const doubtful = told.filter(([, noise, smaller]) => noise.not_better_than.includes(smaller));
  line.hidden = !told.length;
  line.replaceChildren(...(doubtful.length
    ? [`On held-out windows ${doubtful.length} of ${told.length} points of the front are not surely better than the next smaller one: `, ...doubtful.flatMap(([entry], at) => [at ? ", " : "", pick(entry)]), ". "]
    : ["On held-out windows every point of the front is surely better than the next smaller one. "]),
    el("span", { class: "muted" }, "Compared window by window, which tells apart what their bars, each model's own 95 % interval, do not."));
}

function drawRuns() {
  if (!MANY) return;
  const headings = ["run", "model", "text", "trials", "front", "hypervolume", "of the union front"];
  const rows = RUNS.map((run, index) => [
    run.label, run.report.model.name, run.report.data?.source ?? "–", String(run.report.trials.length), String(run.report.front.length),
    (run.trace.at(-1) ?? 0).toPrecision(5), `${DATA.union.filter((point) => point.run === index).length} of ${DATA.union.length}`,
  ]);
  const reference = Object.entries(DATA.reference_point).map(([name, value]) => `${words(name)} ${format(name, value)}`).join(", ");
  fill("runs", table(headings, rows, "Runs side by side"),
    el("p", {}, `All hypervolumes on this page use one reference point: ${reference}. The union front has ${(DATA.union_hypervolume ?? 0).toPrecision(5)}.`),
    ...DATA.warnings.map((text) => el("p", { class: "warning" }, text)));
}

/** What a few points of the front write, the dense model first: people look before they read. */
function drawSamples(state) {
  const { dense, front } = current(state).report;
  const run = BY_KEY.get(state.selected)?.run ?? 0;
  const points = [dense, ...[...front].reverse()].filter((point) => Object.keys(point.samples ?? {}).length);
  const prompts = [...new Set(points.flatMap((point) => Object.keys(point.samples)))];
  const rows = points.map((point) => {
    const entry = BY_KEY.get(`${run}:${point.trial ?? "dense"}`);
    const name = el("button", { type: "button", class: "plain", onclick: () => update({ selected: entry.key }) }, entry.number === "dense" ? "dense model" : `trial ${entry.number}`);
    const size = el("small", { class: "muted" }, ["params", "params_share"].filter((one) => one in entry.values).map((one) => format(one, entry.values[one])).join(" · "));
    return el("tr", {}, el("th", { scope: "row" }, name, " ", size), ...prompts.map((prompt) => {
      const written = String(point.samples[prompt] ?? "").trimEnd().replace(/\n\s*\n/g, "\n");
      const text = /^\s*\n/.test(written) ? written.replace(/^\s*\n/, "") : written.trimStart(); // a new line keeps its indentation
      return el("td", {}, el("span", { class: "prompt muted" }, prompt), text || el("span", { class: "muted" }, "(nothing)"));
    }));
  });
  const heads = ["", ...prompts].map((prompt) => el("th", { scope: "col" }, prompt ? `“${prompt}”` : el("span", { class: "hidden" }, "model")));
  return fill("samples", rows.length ? el("p", { class: "muted" }, "Greedy continuations of fixed prompts, written after the search, which saw none of them.") : null,
    rows.length ? el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows)) : null);
}

/** Dark blue to yellow, monotone in lightness, readable in every common colour blindness (cividis, sampled). */
const CIVIDIS = [[0, 32, 77], [0, 66, 107], [68, 88, 109], [104, 110, 115], [138, 134, 121], [176, 160, 113], [216, 188, 93], [255, 233, 69]];

function shade(share) {
  const position = share * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(position), CIVIDIS.length - 2);
  const mixed = CIVIDIS[low].map((from, channel) => Math.round(from + (position - low) * (CIVIDIS[low + 1][channel] - from)));
  return `rgb(${mixed.join(",")})`;
}

/** Layer x method. Each row has its own logarithmic scale, since methods have units of their own. */
function drawImportance(state) {
  const parts = current(state).report.importance ?? [];
  if (!parts.length) return fill("importance");
  const count = parts[0].scores.length;
  const rows = parts.map(({ method, kind, scores }) => {
    const logs = scores.map((score) => Math.log(Math.max(score, 1e-12)));
    const [low, high] = [Math.min(...logs), Math.max(...logs)];
    return el("tr", {}, el("th", { scope: "row" }, `${words(method)}, ${kind === "mlp" ? "MLP" : kind}`), ...scores.map((score, layer) => {
      const cell = el("td", { title: `${words(method)}, ${kind}, layer ${layer}: ${score.toPrecision(3)}` }, el("span", { class: "hidden" }, score.toPrecision(3)));
      cell.style.background = shade(high > low ? (logs[layer] - low) / (high - low) : 0.5);
      return cell;
    }));
  });
  const heads = Array.from({ length: count }, (_, layer) => el("th", { scope: "col" }, layer % 5 ? el("span", { class: "hidden" }, String(layer)) : String(layer)));
  const scale = el("span", { class: "scale", "aria-hidden": "true" }, ...CIVIDIS.map((_, index) => {
    const step = el("span", {});
    step.style.background = shade(index / (CIVIDIS.length - 1));
    return step;
  }));
  return fill("importance",
    el("p", {}, "Dark: the method would miss this layer least. Bright: most. ", scale, " Each row has its own logarithmic scale."),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Importance by layer and method" },
      el("table", { class: "heat" }, el("caption", { class: "hidden" }, "Importance by method (rows) and layer (columns)"),
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), ...heads)), el("tbody", {}, ...rows))));
}

function bars(rows, unit) {
  const most = Math.max(...rows.map(([, value]) => value), 1e-9);
  return el("div", { class: "scroll" }, el("table", { class: "bars" }, el("tbody", {}, ...rows.map(([name, value, text]) => {
    const bar = el("span", { class: "bar" });
    bar.style.width = `${(100 * value) / most}%`;
    return el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "value" }, text ?? `${plain(Number(value.toPrecision(3)))} ${unit}`), el("td", { class: "track", "aria-hidden": "true" }, bar));
  }))));
}

function drawCost(state) {
  const { run, trials, advisor } = current(state).report;
  const seconds = Object.entries(run.seconds ?? {}).sort(([, a], [, b]) => b - a);
  const measured = trials.filter((trial) => typeof trial.seconds === "number").map((trial) => trial.seconds);
  const mean = measured.length ? measured.reduce((sum, value) => sum + value, 0) / measured.length : 0;
  const tokens = spending(advisor, /tokens$/);
  const money = spending(advisor, /^(money|cost)/);
  fill("cost",
    seconds.length ? bars(seconds, "s") : null,
    el("p", {}, `${measured.length} evaluations took ${plain(Number(mean.toPrecision(3)))} s each on average; ${scaled(run.peak_memory_bytes ?? 0, "B")} of memory at most.`),
    tokens.length ? el("h4", {}, "Advisor: tokens") : null, tokens.length ? bars(tokens, "tokens") : null,
    money.length ? el("h4", {}, "Advisor: money") : null, money.length ? bars(money, "USD") : null);
}

const folded = (title, rows) => el("details", {}, el("summary", {}, title), records(rows, title));

/** What each hook of the advisor spent: sums of its number fields whose names match. */
function spending(advisor, pattern) {
  const hooks = advisor?.hooks ?? [];
  const named = Array.isArray(hooks) ? hooks.map((hook) => [hook.hook ?? hook.name, hook]) : Object.entries(hooks);
  return named.map(([name, hook]) => {
    const values = Object.entries(hook ?? {}).filter(([key, value]) => pattern.test(key) && typeof value === "number");
    return [words(name), values.reduce((sum, [, value]) => sum + value, 0)];
  }).filter(([, value]) => value > 0);
}

function drawAdvisor(state) {
  const { advisor, trials } = current(state).report;
  if (!advisor) return fill("advisor");
  const explained = trials.map((trial) => [trial, reasonOf({ trial })]).filter(([, reason]) => reason);
  const shown = Object.entries(advisor).map(([key, part]) => {
    if (part === null) return null;
    if (typeof part !== "object") return el("p", {}, el("strong", {}, `${words(key)}: `), plain(part));
    const amounts = Object.entries(part);
    const drawn = key === "hypervolume_by_origin" && amounts.every(([, value]) => typeof value === "number" && value >= 0);
    if (["proposals", "refusals"].includes(key)) return part.length ? folded(`${words(key)} (${part.length})`, part) : null;
    const { drops, ...rest } = part; // of the filter
    return el("div", {}, el("h3", {}, words(key)), drawn ? bars(amounts, "") : anything(drops ? rest : part, words(key)), drops?.length ? folded(`what the filter was against (${drops.length})`, drops) : null);
  });
  const reasons = explained.map(([trial, reason]) => ({ trial: trial.number, origin: trial.origin, gain: trial.gain, reason }));
  return fill("advisor", ...shown, reasons.length ? folded(`trials with a reason (${reasons.length})`, reasons) : null);
}

let order = { column: "number", descending: false };

function drawTrials(state) {
  const details = document.getElementById("all-trials");
  const entries = TRIALS.filter((entry) => entry.number !== "dense");
  const counts = ["complete", "failed", "running"].map((name) => [name, entries.filter((entry) => entry.trial.state === name).length]).filter(([, n]) => n);
  const others = entries.length - counts.reduce((sum, [, n]) => sum + n, 0);
  details.querySelector("summary").textContent = `${entries.length} trials: ${counts.map(([name, n]) => `${n} ${name}`).join(", ")}${others ? `, ${others} other` : ""}`;
  if (!details.open) return;
  const columns = [...(MANY ? ["run"] : []), "number", "origin", "state", ...QUANTITIES, "seconds"];
  const cell = (entry, name) => (name === "run" ? RUNS[entry.run].label : name === "number" || name === "origin" || name === "state" || name === "seconds" ? entry.trial[name] : entry.values?.[name]);
  const sorted = [...entries].sort((a, b) => {
    const [left, right] = [cell(a, order.column), cell(b, order.column)];
    const missing = (left === undefined || left === null) - (right === undefined || right === null);
    return missing || (order.descending ? -1 : 1) * (typeof left === "string" ? left.localeCompare(right) : left - right);
  });
  const heads = columns.map((name) => el("th", { scope: "col", "aria-sort": order.column === name ? (order.descending ? "descending" : "ascending") : "none" },
    el("button", { type: "button", class: "plain", onclick: () => { order = { column: name, descending: order.column === name && !order.descending }; drawTrials(state); } }, words(name))));
  const rows = sorted.map((entry) => el("tr", { class: entry.onFront ? "on-front" : null }, ...columns.map((name) =>
    el("td", {}, name === "number"
      ? el("button", { type: "button", class: "plain", onclick: () => { update({ selected: entry.key }); document.getElementById("front").scrollIntoView(); } }, `${entry.number}${entry.onFront ? " ●" : ""}`)
      : ["run", "origin"].includes(name) ? cell(entry, name) : name === "state" ? stateOf(entry) : format(name, cell(entry, name))))));
  details.querySelector(".body").replaceChildren(el("p", { class: "muted" }, "● on the front. A heading sorts, a number shows the trial above."),
    el("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "All trials" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows))));
}

function drawRecipe(state) {
  const { run, model, data, elsewhere, items, space, objectives } = current(state).report;
  const { seconds, peak_memory_bytes, ...rest } = run;
  const part = (title, value) => el("details", { open: title === "Run" }, el("summary", {}, title), anything(value, title));
  fill("recipe", part("Run", rest), part("Model", model), part("Text", data), elsewhere ? part("Text of another domain", elsewhere) : null, items?.length ? part("Items", items) : null, part("Space", space), part("Objectives", objectives));
}
