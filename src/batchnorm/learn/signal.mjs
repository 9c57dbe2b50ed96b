// How signals travel through a deep network at initialization: sizes of activations on the way forward, norms of gradients on the way back.

import { activationSizes, backward, crossEntropy, forward, gradientNorms, network } from "./network.mjs";
import { normal, uniform } from "./random.mjs";

export const DEEP = { width: 64, rows: 64, classes: 10, deepest: 50 };

// One forward and one backward of a random network of `depth` hidden layers, on random inputs and labels. Both arms of a seed have the same
// weights, inputs and labels.
export function signal({ depth, activation, initialization, normalized, seed }) {
  const { width, rows, classes } = DEEP;
  const model = network([width, ...Array(depth).fill(width), classes], { normalized, activation, initialization }, normal(3 * seed));
  const [next, choose] = [normal(3 * seed + 1), uniform(3 * seed + 2)];
  const x = Float64Array.from({ length: rows * width }, next);
  const labels = Int32Array.from({ length: rows }, () => Math.floor(classes * choose()));
  const { logits, trace } = forward(model, x, rows, true);
  const { loss, gradient } = crossEntropy(logits, labels);
  const gradients = gradientNorms(backward(model, trace, gradient, rows));
  return { model, x, labels, loss, activations: activationSizes(trace).slice(0, depth), gradients };
}

// What the panel shows of it.
export function norms(settings) {
  const { activations, gradients } = signal(settings);
  return { activations, gradients };
}
