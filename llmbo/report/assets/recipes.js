"use strict";
/* The recipes of the allocation path: in words, and what the path of each keeps along depth. */

const RECIPE_NAMES = { own: "this run's", default: "default", "dense-prices": "dense prices", best: "best found" };
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const recipeName = (part) => part.names.map((name) => RECIPE_NAMES[name] ?? words(name)).join(" = ");

function drawRecipes(state) {
  const { recipes = [], model, trials } = current(state).report;
  if (!recipes.length) return fill("allocation");
  const run = BY_KEY.get(state.selected)?.run ?? 0;
  const said = recipes.flatMap((part, index) => [
    el("dt", {}, recipeSign(index), ` ${recipeName(part)}`),
    el("dd", {}, `${part.words}.`, ...(part.trials?.length ? savedBy(part, run) : [])),
  ]);
  const shares = [...new Set(recipes.flatMap((part) => part.paths.map((path) => path.share)))].sort((a, b) => a - b);
  const full = fullWidths({ run });
  return fill("allocation",
    el("p", { class: "muted" }, "What a step of every block is worth when models of a size are made; the dense model's own prices are changed by what is said here, in logarithms."),
    el("dl", {}, ...said),
    recipes.some((part) => part.names.includes("best")) || !trials.some((trial) => trial.recipe) ? null : el("p", { class: "muted" }, "Of the recipes that the search tried none was found to be better at two sizes or more."),
    shares.length ? el("p", { class: "muted" }, `What each path keeps of the ${model.num_hidden_layers} layers: attention above, MLPs below. All of them with the width exchanges that were measured along this run's own path; a new run measures them along the path of the recipe that it begins with, so others will differ a little.`) : null,
    el("div", { class: "paths" }, ...shares.map((share) => pathsAt(share, recipes, full))));
}

/** How much of the path's loss the best recipe's trials save. */
const savedBy = (part, run) => {
  const entries = part.trials.map((number) => BY_KEY.get(`${run}:${number}`)).filter(Boolean);
  return [` Saves ${(100 * part.gain).toFixed(1)} % of what the path loses, on average at equal size, in `, ...entries.flatMap((entry, at) => [at ? ", " : "", pick(entry)]), "."];
};

function recipeSign(index) {
  return el("svg:svg", { class: "recipe-sign", width: 26, height: 10, "aria-hidden": "true" }, el("svg:path", { d: "M0,5 H26", ...stroke(index) }));
}

/** Colour and dashes say the same; the first line is the widest, so that it shows below others that coincide with it. */
const stroke = (index) => ({ class: "path", stroke: color(index), "stroke-width": index ? 1.8 : 3.6, "stroke-dasharray": DASHES[index % DASHES.length] || null });

function pathsAt(share, recipes, full) {
  const shown = recipes.map((part, index) => ({ index, name: recipeName(part), kept: part.paths.find((path) => path.share === share)?.architecture })).filter(({ kept }) => kept);
  const [width, half, gap] = [320, 70, 20];
  const count = shown[0].kept.kv_groups.length;
  const step = (units, most, top) => units.map((kept, layer) => {
    const y = top + half * (1 - kept / most);
    return `${layer ? "L" : "M"}${(layer * width) / count},${y} H${((layer + 1) * width) / count}`;
  }).join(" ");
  const labelEvery = Math.ceil((22 * count) / width);
  const ground = [0, half + gap].map((top) => el("svg:rect", { x: 0, y: top, width, height: half, class: "ground" }));
  const indices = Array.from({ length: count }, (_, layer) => layer).filter((layer) => layer % labelEvery === 0)
    .map((layer) => el("svg:text", { x: ((layer + 0.5) * width) / count, y: half + gap / 2 + 4 }, String(layer)));
  const lines = shown.flatMap(({ index, kept }) => [
    el("svg:path", { d: step(kept.kv_groups, full.groups, 0), ...stroke(index) }), el("svg:path", { d: step(kept.neurons, full.neurons, half + gap), ...stroke(index) }),
  ]);
  const title = `share ${format("params_share", share)}`;
  const rows = Array.from({ length: count }, (_, layer) => [String(layer), ...shown.flatMap(({ kept }) => [kept.kv_groups[layer] + lacking(kept, layer), String(kept.neurons[layer])])]);
  const details = el("details", {}, el("summary", {}, "The same as numbers"));
  details.addEventListener("toggle", () => details.open && details.children.length === 1
    && details.append(table(["layer", ...shown.flatMap(({ name }) => [`KV groups, ${name}`, `neurons, ${name}`])], rows, `Kept by layer at ${title}`)));
  return el("figure", {}, el("figcaption", {}, title),
    el("svg:svg", { viewBox: `-2 -3 ${width + 4} ${2 * half + gap + 6}`, role: "img", "aria-label": `What ${shown.length} paths keep of each layer at ${title}. The table below has the numbers.` }, ...ground, ...indices, ...lines), details);
}
