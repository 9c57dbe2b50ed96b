// Deep: forward and backward of a random network with up to 50 layers. Without batch normalization signals vanish or explode with the
// weights; with it activations keep their size, and gradients of ReLU networks explode by themselves.

import { choice, range } from "../controls.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { RECORDED } from "../recorded.mjs";
import { DEEP, norms } from "../signal.mjs";

const ARMS = ["plain", "bn"];
const COLOR = { plain: COLORS.plain, bn: COLORS.batchNorm };
const KEPT = 12; // networks whose norms are kept
const FLAT = 10; // a gradient that changes by less than this factor from the last layer to the first neither vanishes nor explodes
const LAB = { sigmoid: "gradient", relu: "gradient_relu" }; // activations for which the lab has trained networks or measured gradients

export const deep = {
  id: "deep",
  controls: [
    range("depth", { min: 1, max: DEEP.deepest, value: 30 }), choice("activation", ["sigmoid", "tanh", "relu"]), choice("initialization", ["xavier", "he", "small", "large"]),
    choice("shown", ["both", ...ARMS]), range("seed", { min: 1, max: 20, value: 1 }),
  ],
  guess: { options: ["vanish", "stay", "explode", "unsure"], answer: "explode" },
  check: { options: ["smaller", "residual", "more"], answer: "residual" },

  draw(state, tools) {
    const arms = shown(state);
    return [
      tools.figure(tools.t("activations"), [key(arms, tools), chart(state, arms, "activations", tools)]),
      tools.figure(tools.t("gradients"), [key(arms, tools), chart(state, arms, "gradients", tools)]),
    ];
  },

  describe(state, tools) {
    const { t } = tools;
    return [t("words", { depth: state.depth, activation: t(`activation.${state.activation}`), initialization: t(`initialization.${state.initialization}`), seed: state.seed }), ...shown(state).map((arm) => told(state, arm, tools)), ...lab(state, tools)].join(" ");
  },
};

const shown = (state) => (state.shown === "both" ? ARMS : [state.shown]);
const key = (arms, { t }) => legend(arms.map((arm) => [COLOR[arm], t(`shown.${arm}`)]));

// Norms by layer; the oldest are forgotten.
const found = new Map();

function measured({ depth, activation, initialization, seed }, arm) {
  const name = [depth, activation, initialization, seed, arm].join(" ");
  if (!found.has(name)) found.set(name, norms({ depth, activation, initialization, seed, normalized: arm === "bn" }));
  if (found.size > KEPT) found.delete(found.keys().next().value);
  return found.get(name);
}

function chart(state, arms, quantity, { t, number, width }) {
  const series = arms.map((arm) => measured(state, arm)[quantity]);
  const positive = series.flat().filter((value) => value > 0 && Number.isFinite(value));
  const low = 10 ** Math.min(-1, Math.floor(Math.log10(Math.min(...positive))));
  const high = 10 ** Math.max(1, Math.ceil(Math.log10(Math.max(...positive))));
  const layers = series[0].map((_, i) => i + 1);
  const drawn = new Chart({ width, height: 230, label: t(quantity), x: { domain: [1, state.depth + 1], label: t("axis.layer") }, y: { domain: [low, high], log: true, label: t(`axis.${quantity}`) }, margin: { left: 62 } });
  drawn.rule("y", 1);
  series.forEach((values, k) => {
    const points = values.map((value, i) => [i + 1, value > 0 ? value : NaN]);
    drawn.line(points, { color: COLOR[arms[k]] });
    drawn.dots(points.filter(([, value]) => Number.isFinite(value)), { color: COLOR[arms[k]], radius: layers.length > 25 ? 2 : 3 });
  });
  return drawn.values(layers, (layer, i) => [t("layer", { layer }), ...arms.map((arm, k) => `${t(`shown.${arm}`)}: ${number(series[k][i], 3, 0)}`)].join("\n")).svg;
}

// The norms at both ends, and whether the gradient vanishes or explodes on its way to the first layer.
function told(state, arm, { t, number }) {
  const { activations, gradients } = measured(state, arm);
  const [first, last] = [gradients[0], gradients.at(-2)];
  const factor = first / last;
  const way = first === 0 || factor < 1 / FLAT ? "vanishes" : factor > FLAT ? "explodes" : "stays";
  const text = (value) => number(value, 2, 0);
  return t(`words.${way}`, { arm: t(`shown.${arm}`), size: text(activations.at(-1)), first: text(first), last: text(last), factor: text(factor > 1 ? factor : 1 / factor) });
}

function lab({ activation }, { t, number }) {
  const name = LAB[activation];
  if (!name) return [];
  const values = RECORDED.values.depth;
  const each = (arm) => values[name][arm].map((value) => number(value, 2, 0)).join(", ");
  const share = (arm) => values.accuracy_30[arm].map((value) => `${Math.round(100 * value)}%`).join(", ");
  return [t(`words.lab.${activation}`, { plain: each("plain"), bn: each("batch_norm"), plainAccuracy: share("plain"), bnAccuracy: share("batch_norm") })];
}
