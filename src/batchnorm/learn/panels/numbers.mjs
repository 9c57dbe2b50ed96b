// Four numbers: Algorithm 1 step by step, and that normalizing moves and scales but does not change a shape.

import { choice, range, toggle } from "../controls.mjs";
import { make } from "../dom.mjs";
import { forward, histogram, mean, variance } from "../mathematics.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { normal, several, uniform } from "../random.mjs";
import { table } from "../table.mjs";

const TUTORIAL = { values: [0.8, 1.2, 0.9, 1.1], gamma: 0.5, beta: 2, divisor: 0.1 }; // its divisor is wrong: √0.025 is 0.158
const SHAPES = {
  skewed: (next) => -Math.log(1 - next()),
  two: (next, gaussian) => (next() < 0.6 ? 0 : 5) + 0.7 * gaussian(),
  flat: (next) => 4 * next(),
};
const MANY = 2000;
const BINS = 40;
const SPAN = 2.6; // of the axis of x̂; four numbers reach √3

const x = (place) => range(`x${place + 1}`, { min: 0, max: 2, step: 0.05, value: TUTORIAL.values[place] });

export const numbers = {
  id: "numbers",
  controls: [...TUTORIAL.values.map((_, place) => x(place)), range("eps", { min: 1e-8, max: 1, step: 0.25, value: 1e-5, log: true }), toggle("overlay"), choice("shape", Object.keys(SHAPES))],
  guess: { options: ["two", "right", "one", "unsure"], answer: "right" },
  check: { options: ["ten", "same", "tenth"], answer: "same" },

  draw(state, tools) {
    const step = steps(state);
    return [
      tools.figure(tools.t("map"), [mapKey(state, tools), map(state, step, tools)]),
      tools.figure(tools.t("steps"), [stepTable(state, step, tools), make("p", { class: "formula" }, `µ = ${tools.number(step.mean)},  σ² = ${tools.number(step.variance)},  √(σ² + ε) = ${tools.number(step.std)}`)]),
      ...shapes(state, tools),
    ];
  },

  describe(state, { t, number, list }) {
    const step = steps(state);
    const many = shape(state);
    return [
      t("words", { x: list(step.values), mean: step.mean, variance: step.variance, eps: state.eps, std: step.std, normalized: list(step.normalized), deviation: step.deviation, output: list(step.output) }),
      state.overlay ? t("words.overlay", { wrong: list(wrong(step)), deviation: Math.sqrt(variance(wrong(step))) }) : "",
      t("words.shape", { shape: t(`shape.${state.shape}`), before: skewness(many.values), after: skewness(many.normalized), mean: mean(many.normalized), deviation: number(Math.sqrt(variance(many.normalized)), 5) }),
    ];
  },
};

function steps(state) {
  const values = [state.x1, state.x2, state.x3, state.x4];
  const result = forward(values, TUTORIAL.gamma, TUTORIAL.beta, state.eps);
  return { values, ...result, deviation: Math.sqrt(variance(result.normalized)) };
}

const wrong = ({ deviations }) => deviations.map((value) => value / TUTORIAL.divisor);

function shape({ shape: name, eps }) {
  const [next, gaussian] = [uniform(3), normal(4)];
  const values = several(MANY, () => SHAPES[name](next, gaussian));
  return { values, ...forward(values, 1, 0, eps) };
}

function skewness(values) {
  const [center, deviation] = [mean(values), Math.sqrt(variance(values))];
  return Number(mean(values.map((value) => ((value - center) / deviation) ** 3)).toFixed(4));
}

const mapKey = (state, { t }) => legend([[COLORS.ink, t("key.x")], [COLORS.batchNorm, t("key.normalized")], ...(state.overlay ? [[COLORS.plain, t("key.tutorial"), "3 2"]] : [])]);

// The numbers on a line above, normalized on a line below, joined.
function map(state, step, { t, number, width }) {
  const chart = new Chart({ width, height: 210, label: t("map"), x: { domain: [0, 2], label: "", ticks: [] }, y: { domain: [0, 1] }, margin: { bottom: 118, top: 34 } });
  const below = new Chart({ width, height: 210, label: "", x: { domain: [-SPAN, SPAN], label: t("key.normalized") }, y: { domain: [0, 1] } });
  const [top, bottom] = [chart.bottom, below.bottom];
  for (let value = 0; value <= 2; value += 0.5) chart.add(make("svg:text", { x: chart.x(value), y: top - 24, "text-anchor": "middle", class: "tick" }, number(value)));
  chart.add(...[...below.svg.childNodes].filter(({ nodeName }) => nodeName !== "clipPath"));
  chart.add(make("svg:line", { x1: chart.x(step.mean), x2: below.x(0), y1: top, y2: bottom, stroke: COLORS.muted, "stroke-dasharray": "3 3" }));
  chart.text(chart.x(step.mean), top + 18, `µ = ${number(step.mean)}`, { anchor: "middle" });
  step.values.forEach((value, i) => {
    const [from, to] = [chart.x(value), below.x(step.normalized[i])];
    const name = `x${i + 1}`;
    const told = `${"x₁x₂x₃x₄".slice(2 * i, 2 * i + 2)} = ${number(value)}\nx̂ = ${number(step.normalized[i], 5)}`;
    chart.add(make("svg:line", { x1: from, x2: to, y1: top, y2: bottom, stroke: COLORS.batchNorm, "stroke-width": 1, opacity: 0.55 }));
    if (state.overlay && Math.abs(wrong(step)[i]) < SPAN) chart.add(make("svg:circle", { cx: below.x(wrong(step)[i]), cy: bottom, r: 6, fill: "none", stroke: COLORS.plain, "stroke-width": 1.6, "stroke-dasharray": "3 2", "data-value": number(wrong(step)[i]) }));
    chart.add(make("svg:circle", { cx: to, cy: bottom, r: 5.5, fill: COLORS.batchNorm, "data-value": told }));
    chart.add(make("svg:circle", { cx: from, cy: top, r: 8, fill: COLORS.ink, stroke: "var(--paper)", "stroke-width": 1.5, "data-drag": name, "data-value": told }));
  });
  return chart.svg;
}

function stepTable(state, step, { t, number }) {
  const columns = [
    ["x", step.values], ["x − µ", step.deviations], ["(x − µ)²", step.deviations.map((value) => value * value)], ["x̂", step.normalized], ["y = 0.5 x̂ + 2", step.output],
    ...(state.overlay ? [[t("column.tutorial"), wrong(step)]] : []),
  ];
  const rows = step.values.map((_, i) => [String(i + 1), ...columns.map(([, values]) => number(values[i]))]);
  const means = [t("row.mean"), ...columns.map(([, values]) => number(mean(values)))];
  return table(t("steps"), ["i", ...columns.map(([name]) => name)], rows, [means]);
}

function shapes(state, { t, half, figure }) {
  const many = shape(state);
  const one = (caption, values, color, low, high) => {
    const counts = histogram(values, low, high, BINS);
    const width = (high - low) / BINS;
    const tallest = Math.max(...counts);
    const chart = new Chart({ width: half, height: 170, label: caption, x: { domain: [low, high], label: "" }, y: { domain: [0, tallest * 1.08] }, margin: { bottom: 26 } });
    chart.bars(counts.map((count, i) => [low + i * width, low + (i + 1) * width, count, t("bar", { count: String(count), share: String(MANY) })]), { color });
    return { chart, tallest, width };
  };
  const center = mean(many.values);
  const spread = Math.sqrt(variance(many.values));
  const before = one(t("before"), many.values, COLORS.muted, center - 3.2 * spread, center + 3.2 * spread);
  const after = one(t("after"), many.normalized, COLORS.batchNorm, -3.2, 3.2);
  const bell = Array.from({ length: 65 }, (_, i) => -3.2 + i / 10).map((at) => [at, (MANY * after.width * Math.exp(-at * at / 2)) / Math.sqrt(2 * Math.PI)]);
  after.chart.line(bell, { color: COLORS.plain, dash: "5 3", width: 1.4 });
  return [figure(t("before"), [before.chart.svg], { half: true }), figure(t("after"), [after.chart.svg], { half: true })];
}
