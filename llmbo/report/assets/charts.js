"use strict";
/* The two charts: the front, and hypervolume. Each is drawn whole from the state; ECharts finds what changed. */

const CHARTS = {};

function chart(id) {
  CHARTS[id] ??= echarts.init(document.getElementById(id), null, { renderer: "canvas" });
  return CHARTS[id];
}

const axisStyle = () => ({
  nameTextStyle: { color: css("--text"), fontSize: 13 },
  axisLabel: { color: css("--muted"), hideOverlap: true, fontSize: 13 },
  axisLine: { lineStyle: { color: css("--muted") } },
  splitLine: { lineStyle: { color: css("--line") } },
});

const common = (narrow) => ({
  animation: false,
  aria: { enabled: false }, // the chart's own label says more
  textStyle: { fontFamily: "inherit", color: css("--text") },
  legend: { type: "scroll", itemWidth: 16, top: 0, left: 0, right: 0, textStyle: { color: css("--text"), fontSize: 13 }, inactiveColor: css("--muted"), pageTextStyle: { color: css("--muted") } },
  grid: { left: 8, right: narrow ? 12 : 24, top: 48, bottom: 32, containLabel: true },
  tooltip: { trigger: "item", confine: true, backgroundColor: css("--card"), borderColor: css("--line"), textStyle: { color: css("--text") } },
});

/** The entries that no other beats on both axes, best x first. */
function staircase(entries, x, y) {
  const [signX, signY] = [maximized(x) ? -1 : 1, maximized(y) ? -1 : 1];
  const sorted = [...entries].sort((a, b) => signX * (a.values[x] - b.values[x]) || signY * (a.values[y] - b.values[y]));
  let best = Infinity;
  return sorted.filter((entry) => {
    const better = signY * entry.values[y] < best;
    if (better) best = signY * entry.values[y];
    return better;
  });
}

function hover(entry, x, y) {
  const names = [...new Set([x, y, ...OBJECTIVES.map((one) => one.name), ...CONSTRAINTS.map((bound) => bound.name), ...[...ABOUT].filter(([, row]) => row.brief).map(([name]) => name)])];
  const reason = reasonOf(entry);
  return el("div", { class: "hover" },
    el("strong", {}, `${nameOf(entry)} · ${entry.trial.origin}${entry.onFront ? " · on the front" : ""}`),
    ...names.filter((name) => name in entry.values).map((name) => {
      const heldout = entry.heldout?.[name];
      const seen = isQuality(name) && typeof heldout === "number" ? ` (held-out ${[format(name, heldout), plusMinus(entry, name)].join(" ").trim()})` : "";
      return el("div", {}, `${words(name)}: ${withUnit(name, entry.values[name])}${seen}`);
    }),
    entry.counts ? null : el("div", {}, stateOf(entry)),
    ...broken(entry).map((text) => el("div", { class: "broken" }, `breaks ${text}`)),
    reason ? el("em", {}, reason) : null);
}

/** Constraints on the two axes, as the areas that they forbid. */
function forbidden(x, y) {
  return CONSTRAINTS.flatMap(({ name, maximum }) => {
    const axis = { [x]: "xAxis", [y]: "yAxis" }[name];
    return axis ? [[{ [axis]: maximum, name: `${words(name)} > ${withUnit(name, maximum)}` }, { [axis]: "max" }]] : [];
  });
}

/** The diameter of a trial's mark; it grows with the quantity that `size` names. */
function diameters(entries, size) {
  const plain = entries.length > 500 ? 7 : 9;
  const known = entries.map((entry) => entry.values[size]).filter(Number.isFinite);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  return (entry) => (high > low && size in entry.values ? plain - 3 + (14 * (entry.values[size] - low)) / (high - low) : plain);
}

function drawFront(state) {
  const { x, y } = state;
  const shown = TRIALS.filter((entry) => entry.values && x in entry.values && y in entry.values);
  const tried = shown.filter((entry) => entry.number !== "dense");
  const diameter = diameters(tried, state.size);
  const point = (entry, extra = {}) => ({ value: [entry.values[x], entry.values[y]], key: entry.key, symbol: symbolOf(entry), symbolSize: diameter(entry), ...extra });
  const groups = MANY ? RUNS.map((run, index) => [run.label, tried.filter((entry) => entry.run === index)]) : ORIGINS.map((origin) => [origin, tried.filter((entry) => entry.trial.origin === origin)]);
  const step = maximized(x) ? "start" : "end";
  const line = (name, entries, shade, width) => ({
    name, type: "line", step, data: staircase(entries, x, y).map((entry) => ({ value: [entry.values[x], entry.values[y]], key: entry.key })),
    color: shade, lineStyle: { width, color: shade }, symbol: "none", silent: true, z: 3,
  });
  const series = groups.map(([name, entries]) => ({
    name, type: "scatter", z: 4, color: entries.length ? colorOf(entries[0]) : undefined,
    symbol: entries.length && !MANY ? symbolOf(entries[0]) : "circle",
    data: entries.map((entry) => point(entry, {
      itemStyle: entry.counts
        ? { opacity: entry.onFront ? 1 : 0.55, borderColor: css("--text"), borderWidth: entry.onFront ? 1 : 0 }
        : { color: "transparent", borderColor: colorOf(entry), borderWidth: 1.5, borderType: entry.trial.feasible === false ? "dashed" : "solid" },
    })),
  }));
  const complete = tried.filter((entry) => entry.counts);
  if (MANY) {
    RUNS.forEach((run, index) => series.push({ ...line(run.label, complete.filter((entry) => entry.run === index), color(index), 1), z: 2 }));
    series.push(line("union front", complete, css("--text"), 2));
  } else series.push(line(x in itemsOf(RUNS[0].report.dense) || y in itemsOf(RUNS[0].report.dense) ? "front" : "front, proxy windows", complete, css("--text"), 1.5));
  const judged = tried.filter((entry) => typeof entry.heldout?.[y] === "number" && isQuality(y));
  if (judged.length) series.push({
    name: "front, held-out windows", type: "scatter", symbol: "path://M0,0 L10,10 M10,0 L0,10", symbolSize: 7, z: 5, color: css("--heldout"),
    itemStyle: { color: "transparent", borderColor: css("--heldout"), borderWidth: 1.5 },
    data: judged.map((entry) => ({ value: [entry.values[x], entry.heldout[y]], key: entry.key })),
  });
  const bars = judged.filter((entry) => plusMinus(entry, y)).flatMap((entry) =>
    [...[-1, 1].map((side) => [entry.values[x], entry.heldout[y] + side * pointOf(entry).noise[y]]), ["-", "-"]]); // gaps between them
  if (bars.length) series.push({
    name: "front, held-out windows", type: "line", symbol: "none", silent: true, z: 3, data: bars, color: css("--heldout"), lineStyle: { width: 1, opacity: 0.5, color: css("--heldout") },
  });
  const limits = state.limit && state.limit.name === x ? [{ xAxis: state.limit.value }] : state.limit && state.limit.name === y ? [{ yAxis: state.limit.value }] : [];
  series.push({
    name: "dense model", type: "scatter", symbol: "path://M10,0 L12.5,7 L20,7.6 L14.2,12.4 L16.2,20 L10,15.8 L3.8,20 L5.8,12.4 L0,7.6 L7.5,7 Z", symbolSize: 16, color: css("--text"), z: 6, itemStyle: { opacity: 1 },
    data: shown.filter((entry) => entry.number === "dense").map((entry) => ({ value: [entry.values[x], entry.values[y]], key: entry.key })),
    markLine: { silent: true, symbol: "none", data: limits, label: { formatter: "≤ limit", color: css("--text") }, lineStyle: { color: css("--heldout"), type: "dashed" } },
    markArea: { silent: true, data: forbidden(x, y), itemStyle: { color: css("--forbidden") }, label: { color: css("--muted") } },
  });
  const chosen = BY_KEY.get(state.selected);
  if (chosen?.values && x in chosen.values && y in chosen.values) series.push({
    name: "selected", type: "scatter", symbol: "circle", symbolSize: 20, z: 7, silent: true, legendHoverLink: false,
    itemStyle: { color: "transparent", borderColor: css("--accent"), borderWidth: 3 }, data: [[chosen.values[x], chosen.values[y]]],
  });
  const narrow = document.getElementById("front-chart").clientWidth < 500;
  chart("front-chart").setOption({
    ...common(narrow),
    legend: { ...common(narrow).legend, data: [...new Set(series.map((s) => s.name))].filter((name) => name !== "selected") },
    tooltip: { ...common(narrow).tooltip, formatter: (item) => (item.data?.key ? hover(BY_KEY.get(item.data.key), x, y) : "") },
    xAxis: axis(x, "x", state, shown),
    yAxis: axis(y, "y", state, shown),
    series,
  }, { notMerge: true });
}

/** One axis: its label, and unless everything is asked for, nothing far beyond the reference point. */
function axis(name, side, state, shown) {
  const values = shown.map((entry) => entry.values[name]);
  const reference = DATA.reference_point[name];
  const worst = 1.15 * reference;
  const cut = !state.everything && side === "y" && !maximized(name) && Number.isFinite(worst) && Math.max(...values) > worst && Math.min(...values) < worst;
  return {
    type: "value", scale: true, name: unitOf(name) ? `${words(name)} (${unitOf(name)})` : words(name),
    nameLocation: side === "x" ? "middle" : "end", nameGap: side === "x" ? 28 : 8, max: cut ? worst : undefined, ...axisStyle(),
    nameTextStyle: { color: css("--text"), fontSize: 13, align: side === "y" ? "left" : "center" },
    axisLabel: { ...axisStyle().axisLabel, formatter: (value) => format(name, value).replace(".0 %", " %") },
  };
}

function drawHypervolume(state) {
  const seconds = state.over === "seconds";
  const series = [];
  RUNS.forEach((run, index) => {
    const complete = TRIALS.filter((entry) => entry.run === index && entry.number !== "dense" && entry.trial.state === "complete");
    let spent = 0;
    const points = complete.slice(0, run.trace.length).map((entry, position) => {
      spent += entry.trial.seconds ?? 0;
      const gained = run.trace[position] - (position ? run.trace[position - 1] : 0);
      return { value: [seconds ? spent : position + 1, run.trace[position]], key: entry.key, gained };
    });
    const shade = MANY ? color(index) : css("--muted");
    series.push({ name: MANY ? run.label : "hypervolume", type: "line", step: "end", symbol: "none", data: points, color: shade, lineStyle: { width: 1.5, color: shade }, silent: true, z: 2 });
    for (const origin of ORIGINS) {
      const own = points.filter((point) => point.gained > 0 && BY_KEY.get(point.key).trial.origin === origin);
      if (own.length) series.push({
        name: origin, type: "scatter", symbolSize: 8, z: 3, symbol: SYMBOLS[ORIGINS.indexOf(origin) % SYMBOLS.length], data: own,
        color: MANY ? shade : color(ORIGINS.indexOf(origin)),
      });
    }
  });
  const narrow = document.getElementById("hypervolume-chart").clientWidth < 500;
  const text = (item) => {
    const entry = BY_KEY.get(item.data.key);
    return el("div", { class: "hover" }, el("strong", {}, `${nameOf(entry)} · ${entry.trial.origin}`),
      el("div", {}, `hypervolume ${item.data.value[1].toPrecision(5)}, gained ${item.data.gained.toPrecision(3)}`));
  };
  chart("hypervolume-chart").setOption({
    ...common(narrow),
    legend: { ...common(narrow).legend, data: [...new Set(series.map((s) => s.name))] },
    tooltip: { ...common(narrow).tooltip, formatter: (item) => (item.data?.key ? text(item) : "") },
    xAxis: { type: "value", name: seconds ? "seconds spent evaluating" : "evaluations", nameLocation: "middle", nameGap: 28, ...axisStyle() },
    yAxis: { type: "value", scale: true, name: "hypervolume", ...axisStyle(), nameTextStyle: { color: css("--text"), fontSize: 13, align: "left" } },
    series,
  }, { notMerge: true });
}
