// Your neighbors: the output for one sample depends on the others in its mini-batch.

import { button, range } from "../controls.mjs";
import { make } from "../dom.mjs";
import { forward, histogram, mean, variance } from "../mathematics.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { normal, several } from "../random.mjs";

const EPS = 1e-5;
const MOST = 64;
const REDRAWS = 400;
const SIZES = [2, 4, 8, 16, 32, 64];
const LAST_SEED = 60;
const BINS = 48;
const SPAN = [-3, 3];

export const neighbors = {
  id: "neighbors",
  controls: [
    range("mine", { min: -2, max: 2, step: 0.1, value: 1 }),
    range("other", { min: -5, max: 5, step: 0.1, value: 0 }),
    range("m", { min: 1, max: MOST, value: 4 }),
    range("seed", { min: 1, max: LAST_SEED, value: 1 }),
    button("again", ({ seed }) => ({ seed: (seed % LAST_SEED) + 1 })),
  ],
  guess: { options: ["same", "moves", "little", "unsure"], answer: "moves" },
  check: { options: ["value", "beta", "error"], answer: "beta" },

  draw(state, tools) {
    return [
      tools.figure(tools.t("batch"), [batchKey(tools), batchPicture(state, tools)]),
      tools.figure(tools.t("noise", { m: String(state.m) }), [noise(state, tools)], { half: true }),
      tools.figure(tools.t("sizes"), [sizesKey(tools), sizes(state, tools)], { half: true }),
    ];
  },

  describe(state, { t }) {
    const { mean: mu, variance: sigma2, output } = forward(batch(state), 1, 0, EPS);
    const drawn = redraws(state.mine, state.m);
    return [
      state.m > 1 ? t("words.batch", { m: String(state.m), seed: String(state.seed), other: state.other, mean: mu, variance: sigma2 }) : t("words.one"),
      t("words.mine", { mine: state.mine, output: output[0] }),
      t("words.noise", { redraws: String(REDRAWS), mean: mean(drawn), deviation: Math.sqrt(variance(drawn)), population: state.mine / Math.sqrt(1 + EPS) }),
    ];
  },
};

// Your value, one neighbor that you set, and others from a standard normal distribution.
export function batch({ mine, other, m, seed }) {
  return [mine, other, ...several(MOST, normal(seed))].slice(0, m);
}

// Your output in mini-batches whose other values are drawn anew.
export function redraws(mine, m, count = REDRAWS) {
  const next = normal(1000 + m);
  return several(count, () => forward([mine, ...several(m - 1, next)], 1, 0, EPS).output[0]);
}

const batchKey = ({ t }) => legend([[COLORS.plain, t("key.mine")], [COLORS.green, t("key.other")], [COLORS.muted, t("key.others")]]);

function batchPicture(state, { t, number, width }) {
  const values = batch(state);
  const { output, mean: mu } = forward(values, 1, 0, EPS);
  const x = { domain: [-5.2, 5.2], label: t("axis.out") };
  const above = new Chart({ width, height: 205, label: t("batch"), x: { ...x, label: "", ticks: [] }, y: { domain: [0, 1] }, margin: { bottom: 150 } });
  const below = new Chart({ width, height: 205, label: "", x, y: { domain: [0, 1] } });
  above.add(...[...below.svg.childNodes].filter(({ nodeName }) => nodeName !== "clipPath"));
  above.add(make("svg:line", { x1: above.x(mu), x2: below.x(0), y1: above.bottom, y2: below.bottom, stroke: COLORS.muted, "stroke-dasharray": "3 3" }));
  const color = (i) => [COLORS.plain, COLORS.green][i] ?? COLORS.muted;
  for (const i of [...values.keys()].reverse()) {
    const [from, to] = [above.x(values[i]), below.x(output[i])];
    const told = `x = ${number(values[i])}\ny = ${number(output[i])}`;
    const named = i < 2;
    above.add(
      make("svg:line", { x1: from, x2: to, y1: above.bottom, y2: below.bottom, stroke: color(i), "stroke-width": named ? 1.6 : 0.7, opacity: named ? 1 : 0.55 }),
      make("svg:circle", { cx: to, cy: below.bottom, r: named ? 6 : 3.5, fill: color(i), "data-value": told }),
      make("svg:circle", { cx: from, cy: above.bottom, r: named ? 8 : 3.5, fill: color(i), stroke: "var(--paper)", "stroke-width": named ? 1.5 : 0, "data-value": told, "data-drag": named && ["mine", "other"][i] }));
  }
  return above.svg;
}

function noise(state, { t, half }) {
  const drawn = redraws(state.mine, state.m);
  const counts = histogram(drawn, ...SPAN, BINS);
  const width = (SPAN[1] - SPAN[0]) / BINS;
  const chart = new Chart({ width: half, height: 220, label: t("noise", { m: String(state.m) }), x: { domain: SPAN, label: t("axis.mine") }, y: { domain: [0, Math.max(...counts) * 1.15] } });
  chart.bars(counts.map((count, i) => [SPAN[0] + i * width, SPAN[0] + (i + 1) * width, count, t("bar", { count: String(count), redraws: String(REDRAWS) })]), { color: COLORS.plain });
  return chart.rule("x", state.mine, { color: COLORS.ink, text: t("population"), anchor: state.mine > 0 ? "end" : "start" }).svg;
}

const sizesKey = ({ t }) => legend([[COLORS.plain, t("key.measured")], [COLORS.muted, "∝ 1 / √m", "4 3"]]);

function sizes(state, { t, number, half }) {
  const measured = SIZES.map((m) => [m, Math.sqrt(variance(redraws(state.mine, m)))]);
  const chart = new Chart({ width: half, height: 220, label: t("sizes"), x: { domain: [1.8, 72], label: t("axis.size"), log: true, ticks: SIZES }, y: { domain: [0.05, 2], label: t("axis.deviation"), log: true, ticks: [0.05, 0.1, 0.2, 0.5, 1, 2] } });
  const anchor = measured.at(-1)[1] * Math.sqrt(SIZES.at(-1));
  chart.line([[2, anchor / Math.sqrt(2)], [64, anchor / 8]], { color: COLORS.muted, dash: "4 3", width: 1.4 });
  chart.line(measured, { color: COLORS.plain });
  return chart.dots(measured.map(([m, deviation]) => [m, deviation, t("size", { m: String(m), deviation: number(deviation) })]), { color: COLORS.plain }).svg;
}
