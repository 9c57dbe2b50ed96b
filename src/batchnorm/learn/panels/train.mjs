// Train it: a small network learns in the page, with and without batch normalization, at learning rates from too small to far too large.

import { choice, play, range, toggle } from "../controls.mjs";
import { make } from "../dom.mjs";
import { histogram } from "../mathematics.mjs";
import { classes, forward } from "../network.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { RATES, reaches, stepsToTarget, TASK, task, train as learn } from "../training.mjs";

const ARMS = ["plain", "bn"];
const COLOR = { plain: COLORS.plain, bn: COLORS.batchNorm };
const REGIONS = ["var(--series-3)", "var(--series-4)", "var(--series-6)"];
const KEPT = 8; // trainings that are kept
const EDGE = 2.4; // of the map, in standard deviations
const CELLS = 44;
const BINS = 40;
const WIDEST = 8; // of the histograms

export const train = {
  id: "train",
  controls: [
    range("rate", { min: 0.001, max: 10, step: 0.5, value: 0.0316, log: true }), choice("shown", ["both", ...ARMS]), range("seed", { min: 1, max: 20, value: 1 }),
    range("step", { min: 0, max: TASK.steps, step: TASK.every, value: 150 }), play("play", "step", { every: 50, by: TASK.every }), toggle("sweep"),
  ],
  guess: { options: ["saves", "neither", "slower", "unsure"], answer: "neither" },
  check: { options: ["none", "less", "same"], answer: "less" },

  draw(state, tools) {
    const arms = shown(state);
    return [
      tools.figure(tools.t("accuracy"), [key(arms, tools), curve(state, arms, tools, "accuracy")], { half: true }),
      tools.figure(tools.t("loss"), [key(arms, tools), curve(state, arms, tools, "loss")], { half: true }),
      ...arms.map((arm) => tools.figure(tools.t(`map.${arm}`, { step: String(at(state, arm).step) }), [map(state, arm, tools)], { half: true })),
      ...arms.map((arm) => tools.figure(tools.t(`hidden.${arm}`), [hidden(state, arm, tools)], { half: true })),
      tools.figure(tools.t("norms"), [norms(state, arms, tools)]),
      ...(state.sweep ? [tools.figure(tools.t("steps"), [key(arms, tools), sweep(state, arms, tools)])] : []),
    ];
  },

  describe(state, { t, number, list }) {
    const said = shown(state).map((arm) => {
      const seen = training(state, arm);
      const now = at(state, arm);
      const reached = stepsToTarget(seen);
      const received = hiddenValues(state, arm);
      return [
        t("words.now", { arm: t(`shown.${arm}`), step: now.step, accuracy: percent(now.accuracy), loss: number(now.loss, 3), norms: list(now.norms, 2), off: percent(share(received, (value) => value <= 0)) }),
        reached === null ? t("words.never", { steps: TASK.steps, accuracy: percent(seen.at(-1).accuracy) }) : t("words.reached", { reached: String(reached) }),
      ].join(" ");
    });
    return [t("words", { rate: state.rate, seed: state.seed }), ...said, state.sweep ? swept(state, { t, number }) : ""].join(" ");
  },
};

const shown = (state) => (state.shown === "both" ? ARMS : [state.shown]);
const percent = (value) => `${Math.round(1000 * value) / 10}%`;
const share = (values, test) => values.filter(test).length / values.length;
const key = (arms, { t }) => legend(arms.map((arm) => [COLOR[arm], t(`shown.${arm}`)]));

// Trainings by rate, seed and arm; the oldest is forgotten.
const trainings = new Map();

function training({ rate, seed }, arm) {
  const name = `${rate} ${seed} ${arm}`;
  if (!trainings.has(name)) trainings.set(name, learn({ rate, seed, normalized: arm === "bn" }));
  if (trainings.size > KEPT) trainings.delete(trainings.keys().next().value);
  return trainings.get(name);
}

// What was seen at the chosen step, or at the last before the training ended.
const at = (state, arm) => training(state, arm).findLast(({ step }) => step <= state.step);

function curve(state, arms, { t, number, half }, quantity) {
  const all = arms.map((arm) => training(state, arm));
  const largest = Math.max(...all.flat().map(({ loss }) => loss).filter(Number.isFinite));
  const loss = { domain: [1e-3, 10 ** Math.max(1, Math.ceil(Math.log10(largest)))], log: true, label: t("axis.loss") };
  const chart = new Chart({ width: half, height: 220, label: t(quantity), x: { domain: [0, TASK.steps], label: t("axis.step") }, y: quantity === "loss" ? loss : { domain: [0, 1], label: t("axis.accuracy"), ticks: [0, 0.5, TASK.target] } });
  if (quantity === "accuracy") chart.rule("y", TASK.target);
  all.forEach((seen, i) => chart.line(seen.map((each) => [each.step, each[quantity]]), { color: COLOR[arms[i]] }));
  chart.rule("x", state.step, { dash: "none" });
  const steps = all[0].map(({ step }) => step);
  chart.values(steps, (step, i) => [`${t("axis.step")} ${step}`, ...arms.map((arm, k) => `${t(`shown.${arm}`)}: ${all[k][i] ? number(all[k][i][quantity], 3) : "–"}`)].join("\n"));
  chart.add(make("svg:circle", { cx: chart.x(state.step), cy: chart.bottom, r: 7, fill: COLORS.ink, "data-drag": "step" }));
  return chart.svg;
}

// The class that the network gives to each place, and the points to learn from.
function map(state, arm, { t, half }) {
  const { data } = task(state.seed);
  const domain = [-EDGE, EDGE];
  const side = Math.min(half, 300);
  const chart = new Chart({ width: half, height: side, label: t(`map.${arm}`, { step: String(at(state, arm).step) }), x: { domain, label: "", ticks: [] }, y: { domain }, margin: { top: 4, bottom: 4, left: (half - side) / 2, right: (half - side) / 2 } });
  const step = (2 * EDGE) / CELLS;
  const places = Float64Array.from({ length: 2 * CELLS * CELLS }, (_, k) => -EDGE + step * (0.5 + ((k & 1 ? Math.floor((k >> 1) / CELLS) : (k >> 1) % CELLS))));
  const given = classes(forward(at(state, arm).model, places, CELLS * CELLS).logits, CELLS * CELLS);
  for (let row = 0; row < CELLS; row++) {
    for (let from = 0, to; from < CELLS; from = to) {
      const region = given[row * CELLS + from];
      for (to = from + 1; to < CELLS && given[row * CELLS + to] === region; ) to++;
      const [left, right, bottom, top] = [chart.x(-EDGE + step * from), chart.x(-EDGE + step * to), chart.y(-EDGE + step * row), chart.y(-EDGE + step * (row + 1))];
      if (region >= 0) chart.add(make("svg:rect", { x: left, y: top, width: right - left, height: bottom - top, fill: REGIONS[region], opacity: 0.25, "shape-rendering": "crispEdges" }));
    }
  }
  data.labels.forEach((label, r) => chart.add(make("svg:circle", { cx: chart.x(data.points[2 * r]), cy: chart.y(data.points[2 * r + 1]), r: 2, fill: REGIONS[label] })));
  return chart.svg;
}

// What the second layer's ReLU receives for the points to be tested with.
function hiddenValues(state, arm) {
  const { test } = task(state.seed);
  return Array.from(forward(at(state, arm).model, test.points, test.labels.length).trace[1].received).filter(Number.isFinite);
}

function hidden(state, arm, { t, number, half }) {
  const values = hiddenValues(state, arm);
  const counts = histogram(values, -WIDEST, WIDEST, BINS);
  const width = (2 * WIDEST) / BINS;
  const chart = new Chart({ width: half, height: 150, label: t(`hidden.${arm}`), x: { domain: [-WIDEST, WIDEST], label: "" }, y: { domain: [0, Math.max(...counts, 1) * 1.05] }, margin: { bottom: 24 } });
  chart.bars(counts.map((count, i) => [-WIDEST + i * width, -WIDEST + (i + 1) * width, count, `${number(-WIDEST + i * width)} … ${number(-WIDEST + (i + 1) * width)}: ${percent(count / values.length)}`]), { color: COLOR[arm] });
  return chart.rule("x", 0).svg;
}

function norms(state, arms, { t, number }) {
  const head = ["", ...[1, 2, 3].map((layer) => t("layer", { layer }))].map((name) => make("th", { scope: "col" }, name));
  const rows = arms.map((arm) => make("tr", {}, make("th", { scope: "row" }, t(`shown.${arm}`)), ...at(state, arm).norms.map((norm) => make("td", {}, number(norm, 3)))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

// Steps to the target by seed, rate and arm: computed one by one while the page is idle.
const found = new Map();
const nameOf = (rate, seed, arm) => `${rate} ${seed} ${arm}`;
let computing = false;
let tell = () => {}; // draws the panel that is on the page now

const missing = (state, arms) => RATES.flatMap((rate) => arms.map((arm) => [rate, arm])).filter(([rate, arm]) => !found.has(nameOf(rate, state.seed, arm)));

function compute(state, arms) {
  const [next] = missing(state, arms);
  if (!next || computing) return;
  const [rate, arm] = next;
  computing = true;
  setTimeout(() => {
    found.set(nameOf(rate, state.seed, arm), reaches({ rate, seed: state.seed, normalized: arm === "bn" }));
    computing = false;
    tell();
  });
}

function sweep(state, arms, { t, width, number, redraw }) {
  tell = redraw;
  compute(state, arms);
  const chart = new Chart({ width, height: 220, label: t("steps"), x: { domain: [0.0007, 14], log: true, label: t("axis.rate") }, y: { domain: [0, TASK.steps * 1.12], label: t("axis.steps") } });
  chart.rule("y", TASK.steps, { text: t("never") });
  for (const arm of arms) {
    const points = RATES.map((rate) => [rate, found.get(nameOf(rate, state.seed, arm))]);
    chart.line(points.map(([rate, steps]) => [rate, steps ?? NaN]), { color: COLOR[arm] });
    chart.dots(points.filter(([, steps]) => steps !== undefined).map(([rate, steps]) => [rate, steps ?? TASK.steps * (arm === "bn" ? 1.03 : 1.07), `${t("axis.rate")} ${number(rate)}, ${t(`shown.${arm}`)}: ${steps ?? t("never")}`]), { color: COLOR[arm] });
  }
  if (missing(state, arms).length) chart.svg.setAttribute("aria-busy", "true");
  return chart.svg;
}

function swept(state, { t, number }) {
  const arms = shown(state);
  const all = RATES.length * arms.length;
  const done = all - missing(state, arms).length;
  const told = (arm) => RATES.filter((rate) => found.has(nameOf(rate, state.seed, arm))).map((rate) => `${number(rate)}: ${found.get(nameOf(rate, state.seed, arm)) ?? "–"}`).join("; ");
  return [done < all ? t("words.progress", { done: String(done), all: String(all) }) : "", ...arms.map((arm) => t("words.sweep", { arm: t(`shown.${arm}`), told: told(arm) }))].join(" ");
}
