// Undo: with gamma = sqrt(variance + eps) and beta = mean the layer is the identity, which gradient descent finds too.

import { button, play, range } from "../controls.mjs";
import { backward, forward, mean, variance } from "../mathematics.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";

const EPS = 1e-5;
const STANDARD = [-1.6, -1.1, -0.5, -0.1, 0.2, 0.5, 0.9, 1.7]; // mean 0 and, after division by its deviation, variance 1
const UNIT = STANDARD.map((value) => value / Math.sqrt(variance(STANDARD)));
const STEPS = 40;
const RATE = 0.15;
const DOMAIN = [-8, 10];
const Y_DOMAIN = [-10, 12];

export const undo = {
  id: "undo",
  controls: [
    range("gamma", { min: -3, max: 3, step: 0.05, value: 1 }),
    range("beta", { min: -3, max: 5, step: 0.05, value: 0 }),
    button("match", (state) => ({ gamma: Math.sqrt(state.deviation ** 2 + EPS), beta: state.mean, steps: 0 })),
    range("mean", { min: -2, max: 4, step: 0.1, value: 3 }),
    range("deviation", { min: 0.2, max: 3, step: 0.1, value: 1.8 }),
    range("steps", { min: 0, max: STEPS, value: 0 }),
    play("learn", "steps", { every: 120 }),
  ],
  guess: { options: ["never", "identity", "zero", "unsure"], answer: "identity" },
  check: { options: ["input", "parameters", "both"], answer: "parameters" },

  draw(state, tools) {
    return [tools.figure(tools.t("line"), [lineKey(tools), line(state, tools)], { half: true }), tools.figure(tools.t("learning"), [learningKey(tools), learning(state, tools)], { half: true })];
  },

  describe(state, { t }) {
    const { gamma, beta, values, output } = result(state);
    const error = Math.max(...output.map((y, i) => Math.abs(y - values[i])));
    return [
      t("words.input", { mean: mean(values), deviation: Math.sqrt(variance(values)) }),
      state.steps ? t("words.learned", { steps: String(state.steps), gamma, beta }) : t("words.set", { gamma, beta }),
      t("words.output", { mean: mean(output), deviation: Math.sqrt(variance(output)) }),
      error < 1e-6 ? t("words.identity") : t("words.error", { error }),
    ];
  },
};

// gamma and beta by step of gradient descent on the mean of (y - x)² / 2, from those that the reader chose.
export function descent(values, gamma, beta, steps, rate = RATE) {
  const path = [[gamma, beta]];
  for (let step = 0; step < steps; step += 1) {
    const { output } = forward(values, gamma, beta, EPS);
    const upstream = output.map((y, i) => (y - values[i]) / values.length);
    const gradient = backward(values, upstream, gamma, EPS);
    [gamma, beta] = [gamma - rate * gradient.gamma, beta - rate * gradient.beta];
    path.push([gamma, beta]);
  }
  return path;
}

function result(state) {
  const values = UNIT.map((value) => state.mean + state.deviation * value);
  const path = descent(values, state.gamma, state.beta, STEPS);
  const [gamma, beta] = path[state.steps];
  return { values, path, gamma, beta, ...forward(values, gamma, beta, EPS) };
}

const lineKey = ({ t }) => legend([[COLORS.batchNorm, t("key.output")], [COLORS.muted, "y = x", "4 3"]]);

function line(state, { t, number, half }) {
  const { values, output, gamma, beta, mean: mu, std } = result(state);
  const chart = new Chart({ width: half, height: 280, label: t("line"), x: { domain: DOMAIN, label: "x" }, y: { domain: Y_DOMAIN, label: "y" } });
  const at = (x) => (gamma * (x - mu)) / std + beta;
  chart.line(DOMAIN.map((x) => [x, x]), { color: COLORS.muted, dash: "4 3", width: 1.4 });
  chart.line(DOMAIN.map((x) => [x, at(x)]), { color: COLORS.batchNorm });
  return chart.dots(values.map((x, i) => [x, output[i], `x = ${number(x)}\ny = ${number(output[i])}`]), { color: COLORS.batchNorm }).svg;
}

const learningKey = ({ t }) => legend([[COLORS.green, "γ"], [COLORS.plain, "β"], [COLORS.muted, t("key.target"), "4 3"]]);

function learning(state, { t, number, half }) {
  const { path, std, mean: mu } = result(state);
  const chart = new Chart({ width: half, height: 280, label: t("learning"), x: { domain: [0, STEPS], label: t("axis.steps") }, y: { domain: [-3.2, 5.2], label: t("axis.value") } });
  chart.rule("y", std).rule("y", mu).rule("x", state.steps, { dash: undefined });
  [COLORS.green, COLORS.plain].forEach((color, which) => {
    chart.line(path.map((point, step) => [step, point[which]]), { color });
    chart.dots([[state.steps, path[state.steps][which]]], { color });
  });
  return chart.values(path.map((_, step) => step), (step) => `${t("axis.steps")} ${step}\nγ = ${number(path[step][0])}\nβ = ${number(path[step][1])}`).svg;
}
