"use strict";
/* The selected trial: what is kept of each layer, its numbers against the dense model, how to export it. */

function drawTrial(state) {
  const entry = BY_KEY.get(state.selected);
  const panel = document.getElementById("trial");
  if (!entry) return;
  const origin = entry.number === "dense" ? "nothing removed" : `proposed by ${entry.trial.origin}`;
  const place = entry.onFront ? ", on the front" : "";
  const reason = reasonOf(entry);
  panel.replaceChildren(
    el("h3", { id: "trial-name" }, nameOf(entry)),
    el("p", { class: "muted" }, `${origin}${place}${entry.counts ? "" : `, ${stateOf(entry)}`}`),
    ...broken(entry).map((text) => el("p", { class: "warning" }, `Breaks a constraint: ${text}`)),
    reason ? el("blockquote", {}, reason) : "",
    recipe(entry) ?? "",
    entry.values ? numbers(entry) : "",
    noise(entry) ?? "",
    itemScores(entry) ?? "",
    ...recoveries(entry),
    el("h4", {}, "What each layer keeps"),
    layersLegend(),
    layers(entry),
    layersAsText(entry),
    entry.number === "dense" ? "" : exportCommand(entry, state),
  );
}

/** What `llmbo recover` made of it: numbers before and after, and the curve between them. */
function recoveries(entry) {
  return RUNS[entry.run].recovered.filter(({ trial }) => trial === entry.number).map((made) => {
    const rows = [["kl", "KL from the dense model"], ["loss", "loss, nats per token"]].filter(([name]) => typeof made.before[name] === "number")
      .map(([name, title]) => [title, made.before[name].toFixed(4), made.after[name].toFixed(4)]);
    const right = ({ acc, acc_stderr }) => `${acc.toFixed(3)} ± ${acc_stderr.toFixed(3)}`;
    rows.push(...made.items.map(({ name, count, before, after }) => [`${name}, acc of ${count} items`, right(before), right(after)]));
    return el("section", { class: "recovered" }, el("h4", {}, "Recovered"),
      el("p", { class: "muted" }, `In ${made.folder}: ${made.what}, ${made.tokens} tokens.`),
      table(["held-out", "before", "after"], rows, "Recovered"), curve(made), ...made.items.map(overSteps),
      el("div", { class: "command" }, el("code", {}, made.command)));
  });
}

function curve({ validation, distilled }) {
  const values = validation.map(([, value]) => value);
  const told = `validation ${distilled ? "KL" : "loss"} ${values[0].toFixed(4)} → ${Math.min(...values).toFixed(4)} in ${validation.at(-1)[0]} steps`;
  return drawn(validation, told);
}

/** What was right of a file of items on the way; null where nobody asked. */
function overSteps({ name, before, between }) {
  if (!between.length) return null;
  const points = [[0, before.acc], ...between];
  return drawn(points, `${name}, acc by step: ${points.map(([step, acc]) => `${step}: ${acc.toFixed(3)}`).join(", ")}`);
}

/** Values by step as a line, and in words. */
function drawn(steps, told) {
  const [width, height] = [320, 60];
  const values = steps.map(([, value]) => value);
  const [last, low, high] = [Math.max(1, steps.at(-1)[0]), Math.min(...values), Math.max(...values)];
  const points = steps.map(([step, value]) => `${(width * step) / last},${height * (1 - (value - low) / (high - low || 1))}`).join(" ");
  return el("figure", {}, el("svg:svg", { viewBox: `-2 -2 ${width + 4} ${height + 4}`, class: "curve", role: "img", "aria-label": told },
    el("svg:polyline", { points })), el("figcaption", { class: "muted" }, told));
}

const DENSE_PRICES = { fisher_weight: 0.5, attention_exponent: 1, mlp_exponent: 1, width_exchanges: 1 };  // the others are 0

/** The numbers of the recipe that it stems from, as far as they are not the dense model's prices; null where it stems from none. */
function recipe(entry) {
  if (!entry.trial.recipe) return null;
  const { profile, ...numbers } = entry.trial.recipe;
  const put = Object.entries(numbers).filter(([name, value]) => Math.abs(value - (DENSE_PRICES[name] ?? 0)) >= 0.005);
  const said = put.map(([name, value]) => `${name.replaceAll("_", " ")} ${value.toFixed(2)}`).concat(profile ? ["a profile along depth"] : []).join(", ");
  return el("p", { class: "muted" }, `On or near the path of the recipe ${said || "of dense prices"}.`);
}

function announce(state) {
  const entry = BY_KEY.get(state.selected);
  const values = entry?.values ? [state.x, state.y].map((name) => `${words(name)} ${format(name, entry.values[name])}`).join(", ") : entry?.trial.state;
  document.getElementById("announcement").textContent = entry ? `${nameOf(entry)}: ${values}` : "";
}

function numbers(entry) {
  const dense = BY_KEY.get(`${entry.run}:dense`);
  const asked = itemsOf(pointOf(entry));
  const names = QUANTITIES.filter((name) => name in entry.values && !(name in asked));
  const seen = judged(entry);
  const rows = names.map((name) => {
    const [now, before] = [entry.values[name], dense.values[name]];
    const unit = withUnit(name, now) === format(name, now) ? "" : unitOf(name);
    const label = unit ? el("span", {}, `${words(name)} `, el("small", { class: "muted" }, `(${unit})`)) : words(name);
    const cells = [label, format(name, now), format(name, before), change(name, now, before)];
    cells.splice(2, 0, ...seen.map(([, values, noise]) => {
      if (!isQuality(name) || typeof values[name] !== "number") return "";
      const sure = plusMinus(entry, name, noise ?? null);
      return sure ? el("span", {}, `${format(name, values[name])} `, el("small", { class: "sure muted" }, sure)) : format(name, values[name]);
    }));
    return cells;
  });
  return table(["", seen.length ? "proxy" : "value", ...seen.map(([heading]) => heading), "dense", "change"], rows, `Numbers of ${nameOf(entry)}`);
}

/** What windows of text say of a point, by heading, with what chance leaves open: of the run's own that nothing saw, of another domain, refitted. */
function judged(entry) {
  const [point, another] = [pointOf(entry), RUNS[entry.run].elsewhere];
  const refitted = point?.refitted;
  return [
    ["held-out", entry.heldout, point?.noise], [`held-out, ${another}`, entry.elsewhere, point?.noise_elsewhere], ["refitted: proxy", refitted?.objectives],
    ["refitted: held-out", refitted?.heldout, refitted?.noise], [`refitted: held-out, ${another}`, refitted?.elsewhere, refitted?.noise_elsewhere],
  ].filter(([, values]) => values);
}

/** What ± means, and which smaller points of the front may be as good; null where that is not known. */
function noise(entry) {
  const told = judged(entry).filter(([, , found]) => found);
  if (!told.length) return null;
  const first = RUNS[entry.run].report.front[0].trial === entry.number;
  const verdicts = first ? [] : told.flatMap(([heading, , { by, not_better_than }]) => {
    const smaller = not_better_than.map((number) => BY_KEY.get(`${entry.run}:${number}`)).filter(Boolean);
    return smaller.length
      ? [`Not surely better in ${heading} ${by} than the smaller `, ...smaller.flatMap((other, at) => [at ? ", " : "", pick(other)]), ". "]
      : [`Surely better in ${heading} ${by} than every smaller point of the front${heading === "held-out" ? "" : " that was measured so"}. `];
  });
  const windows = told.map(([heading, , found]) => `${found.windows} ${heading}`).join(", ");
  return el("p", { class: "noise" }, ...verdicts,
    el("small", { class: "muted" }, `${first ? "" : "Compared window by window. "}± is the 95 % interval over ${windows} windows, of the loss that of what it is above the dense model's.`));
}

/** A button that selects a trial. */
const pick = (entry) => el("button", { type: "button", class: "plain", onclick: () => update({ selected: entry.key }) }, nameOf(entry));

/** A share with its standard error, of each file of items that the front was judged on; null without any. */
function itemScores(entry) {
  const dense = BY_KEY.get(`${entry.run}:dense`);
  const error = (name) => {
    const [, file, metric] = /^(.*) (\S+)$/s.exec(name);
    const value = pointOf(entry).items[file][`${metric}_stderr`];
    return typeof value === "number" ? ` ± ${(100 * value).toFixed(1)}` : "";
  };
  const written = (name) => format(name, entry.values[name]).replace(/ %$|$/, (unit) => error(name) + unit);
  const rows = Object.entries(itemsOf(pointOf(entry))).filter(([, value]) => typeof value === "number")
    .map(([name]) => [name, written(name), format(name, dense.values[name]), change(name, entry.values[name], dense.values[name])]);
  return rows.length ? table(["items", "score", "dense", "change"], rows, `Items of ${nameOf(entry)}`) : null;
}

/** Quality changes by a difference, sizes by a percentage. */
function change(name, now, before) {
  if (name === "gain" || typeof before !== "number") return "";
  const difference = now - before;
  const sign = difference > 0 ? "+" : difference < 0 ? "−" : "±";
  if (isQuality(name) || before === 0) return sign + format(name, Math.abs(difference));
  return `${sign}${Math.abs((100 * difference) / before).toFixed(1)} %`;
}

function fullWidths(entry) {
  const { model, space, dense } = RUNS[entry.run].report;
  return {
    groups: Math.max(model.num_key_value_heads ?? 0, ...(dense.architecture.kv_groups ?? []), ...(space?.kv_group_levels ?? [])),
    neurons: Math.max(model.intermediate_size ?? 0, ...(dense.architecture.neurons ?? [])),
    queries: (model.num_attention_heads ?? 1) / (model.num_key_value_heads || 1),
  };
}

const isDropped = (architecture, layer) => architecture.kv_groups[layer] === 0 && architecture.neurons[layer] === 0;

/** Query heads that each KV group of a layer goes without. */
const lacking = (architecture, layer) => (architecture.fewer_queries?.[layer] ? ` without ${architecture.fewer_queries[layer]} query heads each` : "");

function layerText(architecture, layer, full) {
  if (isDropped(architecture, layer)) return `layer ${layer}: dropped`;
  return `layer ${layer}: ${architecture.kv_groups[layer]} of ${full.groups} KV groups${lacking(architecture, layer)}, ${architecture.neurons[layer]} of ${full.neurons} neurons`;
}

/** Attention grows upwards by KV groups, and is as wide as these have query heads; the MLP grows downwards; pale is what was removed, hatched and crossed what is gone altogether. */
function layers(entry) {
  const { architecture } = entry.trial;
  const full = fullWidths(entry);
  const count = architecture.kv_groups.length;
  const dropped = architecture.kv_groups.map((_, layer) => layer).filter((layer) => isDropped(architecture, layer));
  const width = Math.max(240, document.getElementById("trial").clientWidth - 34);
  const [half, gap] = [66, 18];
  const column = width / count;
  const bar = Math.max(1.5, column * 0.78);
  const svg = el("svg:svg", {
    class: "layers", width, height: 2 * half + gap, viewBox: `0 0 ${width} ${2 * half + gap}`, role: "img",
    "aria-label": `${count} layers${dropped.length ? `; dropped: ${dropped.join(", ")}` : "; none dropped"}. The table below has the numbers.`,
  }, el("svg:defs", {}, el("svg:pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    el("svg:rect", { width: 5, height: 5, class: "gone-ground" }), el("svg:rect", { width: 1.6, height: 5, class: "gone-line" }))));
  const labelEvery = Math.ceil(22 / column);
  for (let layer = 0; layer < count; layer += 1) {
    const left = layer * column + (column - bar) / 2;
    const [groups, neurons] = [architecture.kv_groups[layer], architecture.neurons[layer]];
    const heads = 1 - (architecture.fewer_queries?.[layer] ?? 0) / full.queries;
    const block = (top, height, share, kind, across = 1) => {
      const kept = height * share;
      return [
        el("svg:rect", { x: left, y: top, width: bar, height, fill: share ? undefined : "url(#hatch)", class: share ? "removed" : "gone" }),
        share ? el("svg:rect", { x: left, y: kind === "attention" ? top + height - kept : top, width: bar * across, height: kept, class: kind }) : "",
      ];
    };
    const cells = full.groups <= 16 && bar > 3
      ? Array.from({ length: full.groups - 1 }, (_, index) => el("svg:line", { x1: left, x2: left + bar, y1: (half * (index + 1)) / full.groups, y2: (half * (index + 1)) / full.groups, class: "cell" }))
      : [];
    const cross = isDropped(architecture, layer) ? el("svg:text", { x: left + bar / 2, y: half + gap / 2 + 4, class: "cross" }, "×") : "";
    const label = !cross && layer % labelEvery === 0 ? el("svg:text", { x: left + bar / 2, y: half + gap / 2 + 4, class: "index" }, String(layer)) : "";
    svg.append(el("svg:g", {}, el("svg:title", {}, layerText(architecture, layer, full)),
      ...block(0, half, groups / full.groups, "attention", heads), ...cells, ...block(half + gap, half, neurons / full.neurons, "mlp"), cross || label));
  }
  return svg;
}

function layersLegend() {
  const sign = (kind, text) => el("span", { class: "sign" }, el("span", { class: `swatch ${kind}` }), text);
  return el("p", { class: "legend" }, sign("attention", "attention (KV groups, as wide as their query heads), upwards"), sign("mlp", "MLP neurons, downwards"), sign("gone", "none left; × layer dropped"));
}

function layersAsText(entry) {
  const { architecture } = entry.trial;
  const rows = architecture.kv_groups.map((groups, layer) => [String(layer), groups + lacking(architecture, layer), String(architecture.neurons[layer]), isDropped(architecture, layer) ? "dropped" : ""]);
  const details = el("details", {}, el("summary", {}, "The same as numbers"));
  details.addEventListener("toggle", () => details.open && details.children.length === 1 && details.append(table(["layer", "KV groups", "neurons", ""], rows, "Kept by layer")));
  return details;
}

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

function exportCommand(entry, state) {
  const { folder, flags } = RUNS[entry.run];
  const target = `${folder}/trial-${entry.number}${state.format === DATA.formats[0].name ? "" : `-${state.format}`}`;
  const command = `llmbo export ${quoted(folder)} --trial ${entry.number} --format ${state.format}${flags[state.format] ?? ""} --out ${quoted(target)}`;
  const choice = el("select", { id: "export-format", onchange: (event) => update({ format: event.target.value }) },
    ...DATA.formats.map(({ name, title }) => el("option", { value: name, selected: name === state.format }, title)));
  const button = el("button", { type: "button", id: "copy", onclick: () => copy(command, button) }, "Copy");
  return el("div", {}, el("h4", {}, "Take it"), el("p", {}, el("label", { for: "export-format" }, "as "), choice),
    el("div", { class: "command" }, el("code", { id: "export-command" }, command), button));
}

async function copy(text, button) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch { // no clipboard without permission or a secure origin: the old way still works
    const area = el("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Select and copy by hand";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}
