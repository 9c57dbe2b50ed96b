// Gradient paths: dL/dx is the sum of a direct path, one through the variance and one through the mean.

import { choice, range, toggle } from "../controls.mjs";
import { make } from "../dom.mjs";
import { backward, finiteDifferences, forward, sum } from "../mathematics.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { table } from "../table.mjs";

const EPS = 1e-5;
const VALUES = [1.2, 0.9, 1.1]; // after x₁, as in the tutorial
const PATHS = ["direct", "variance", "mean"];
const COLOR = { direct: COLORS.batchNorm, variance: COLORS.green, mean: COLORS.plain };
const LETTER = { direct: "a", variance: "b", mean: "c" };
const UPSTREAM = {
  first: () => [1, 0, 0, 0],
  mixed: () => [0.5, -1, 0.25, 0.75],
  ones: () => [1, 1, 1, 1],
  normalized: (x) => forward(x, 1, 0, EPS).normalized,
};

export const paths = {
  id: "paths",
  controls: [
    ...PATHS.map((path) => toggle(path, true)),
    choice("upstream", Object.keys(UPSTREAM)),
    range("x1", { min: 0, max: 2, step: 0.05, value: 0.8 }),
    range("scale", { min: 0.1, max: 10, step: 0.1, value: 1, log: true }),
    range("gamma", { min: -2, max: 2, step: 0.1, value: 1 }),
  ],
  guess: { options: ["first", "all", "none", "unsure"], answer: "all" },
  check: { options: ["same", "tenth", "ten"], answer: "tenth" },

  draw(state, tools) {
    const found = gradients(state);
    return [
      tools.figure(tools.t("graph"), [graph(state, tools)]),
      tools.figure(tools.t("bars"), [barsKey(tools), bars(state, found, tools)]),
      tools.figure(tools.t("numbers"), [numbersTable(found, tools)]),
    ];
  },

  describe(state, { t, list, number }) {
    const found = gradients(state);
    const on = PATHS.filter((path) => state[path]).map((path) => t(path));
    return [
      t("words.given", { x: list(found.x), gamma: state.gamma, upstream: list(found.upstream), scale: state.scale }),
      t("words.chosen", { paths: on.length ? on.join(t("and")) : t("nothing"), gradient: list(found.chosen) }),
      found.error < 1e-6 ? t("words.right") : t("words.wrong", { error: found.error }),
      t("words.sums", { sum: near(sum(found.input)), along: near(sum(found.input.map((value, i) => value * found.normalized[i]))), numerical: number(found.numericalError, 2) }),
    ];
  },
};

// The gradient by path, of the chosen paths together, and by finite differences.
export function gradients(state) {
  const x = [state.x1, ...VALUES].map((value) => value * state.scale);
  const upstream = UPSTREAM[state.upstream](x);
  const { direct, throughVariance, throughMean, input } = backward(x, upstream, state.gamma, EPS);
  const by = { direct, variance: throughVariance, mean: throughMean };
  const chosen = x.map((_, i) => sum(PATHS.filter((path) => state[path]).map((path) => by[path][i])));
  const numerical = finiteDifferences(x, upstream, state.gamma, EPS, 1e-5 * state.scale);
  const largest = (values) => Math.max(...values.map((value, i) => Math.abs(value - input[i])));
  return { x, upstream, by, chosen, input, numerical, error: largest(chosen), numericalError: largest(numerical), normalized: forward(x, 1, 0, EPS).normalized };
}

const near = (value) => (Math.abs(value) < 1e-9 ? 0 : value); // rounding is no gradient

// Where the gradient flows: from L back to x, along the paths that are switched on.
function graph(state, { t, width }) {
  const height = 190;
  const at = { x: [0.07, 54], xhat: [0.56, 54], y: [0.77, 54], L: [0.94, 54], variance: [0.34, 108], mean: [0.2, 162] };
  const place = (name) => [at[name][0] * width, at[name][1]];
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": t("graph") });
  const arrow = (from, to, path, bend = 0) => {
    const [[x1, y1], [x2, y2]] = [place(from), place(to)];
    const length = Math.hypot(x2 - x1, y2 - y1);
    const [ux, uy] = [(x2 - x1) / length, (y2 - y1) / length];
    const [ax, ay, bx, by] = [x1 + 22 * ux, y1 + 18 * uy, x2 - 24 * ux, y2 - 19 * uy];
    const [cx, cy] = [(ax + bx) / 2 - bend * uy, (ay + by) / 2 + bend * ux];
    const heading = Math.atan2(by - cy, bx - cx);
    const head = [-0.45, 0.45].map((turn) => `${bx - 9 * Math.cos(heading + turn)} ${by - 9 * Math.sin(heading + turn)}`);
    const [color, on] = path ? [COLOR[path], state[path]] : [COLORS.ink, true];
    svg.append(make("svg:path", { d: `M${ax} ${ay} Q${cx} ${cy} ${bx} ${by} M${head[0]} L${bx} ${by} L${head[1]}`, fill: "none", stroke: on ? color : COLORS.grid, "stroke-width": on ? 2.2 : 1.2, "stroke-dasharray": on ? undefined : "3 3", "data-value": path ? t(path) : undefined }));
  };
  arrow("L", "y");
  arrow("y", "xhat");
  arrow("xhat", "x", "direct");
  arrow("xhat", "variance", "variance", 6);
  arrow("variance", "x", "variance", 6);
  arrow("xhat", "mean", "mean", -34);
  arrow("mean", "x", "mean", 16);
  for (const [name, text] of [["x", "x"], ["xhat", "x̂"], ["y", "y"], ["L", "L"], ["variance", "σ²"], ["mean", "µ"]]) {
    const [cx, cy] = place(name);
    svg.append(make("svg:circle", { cx, cy, r: 16, fill: "var(--raised)", stroke: COLORS.muted }), make("svg:text", { x: cx, y: cy + 5, "text-anchor": "middle", class: "node" }, text));
  }
  return svg;
}

const barsKey = ({ t }) => legend([...PATHS.map((path) => [COLOR[path], `${LETTER[path]}: ${t(path)}`]), [COLORS.ink, t("key.sum")], [COLORS.red, t("key.numerical"), "3 2"]]);

function bars(state, found, { t, number, width }) {
  const all = [...PATHS.flatMap((path) => found.by[path]), ...found.numerical, ...found.chosen].map(Math.abs);
  const most = Math.max(...all, 1e-9) * 1.15;
  const chart = new Chart({ width, height: 240, label: t("bars"), x: { domain: [0.4, 4.6], label: t("axis.input"), ticks: [1, 2, 3, 4] }, y: { domain: [-most, most], label: "dL/dxᵢ" }, margin: { left: 62 } });
  found.x.forEach((_, i) => {
    PATHS.forEach((path, place) => {
      const height = found.by[path][i];
      chart.bars([[i + 0.66 + place * 0.16, i + 0.8 + place * 0.16, height, `${LETTER[path]}${i + 1} = ${number(height)}`]], { color: COLOR[path], opacity: state[path] ? 0.9 : 0.18 });
    });
    chart.bars([[i + 1.14, i + 1.34, found.chosen[i], `${t("key.sum")} = ${number(found.chosen[i])}`]], { color: COLORS.ink, opacity: 0.85 });
    chart.line([[i + 1.1, found.numerical[i]], [i + 1.38, found.numerical[i]]], { color: COLORS.red, width: 2.4, dash: "3 2" });
  });
  return chart.line([[0.4, 0], [4.6, 0]], { color: COLORS.muted, width: 0.9 }).svg;
}

function numbersTable(found, { t, number }) {
  const columns = [found.x, found.upstream, ...PATHS.map((path) => found.by[path]), found.input, found.numerical];
  const rows = found.x.map((_, i) => [String(i + 1), ...columns.map((values) => number(near(values[i])))]);
  const sums = [t("row.sum"), "", ...columns.slice(1).map((values) => number(Math.abs(sum(values)) < 1e-6 ? 0 : sum(values)))];
  return table(t("numbers"), ["i", "x", "dL/dy", "a", "b", "c", "a + b + c", t("key.numerical")], rows, [sums]);
}
