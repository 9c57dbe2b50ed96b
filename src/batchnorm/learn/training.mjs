// A network with two hidden layers of ReLU learns to tell the arms of a spiral apart, without and with batch normalization. Both begin with
// the same weights and see the same batches. The points are standardized and the weights are He's, so that the plain network starts well.

import { accuracy, backward, crossEntropy, descend, forward, gradientNorms, network } from "./network.mjs";
import { normal, uniform } from "./random.mjs";

export const TASK = { classes: 3, points: 600, turns: 0.75, noise: 0.1, hidden: 32, batch: 50, steps: 600, every: 5, target: 0.95 };

const SIZES = [2, TASK.hidden, TASK.hidden, TASK.classes];

// The learning rates of a sweep, half a power of ten apart: those of the panel's slider.
export const RATES = [-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1].map((exponent) => Number((10 ** exponent).toPrecision(3)));

// Points on the arms of a spiral, standardized: `points` (rows x 2) and `labels`.
export function spiral(seed, rows = TASK.points) {
  const [along, noise] = [uniform(seed), normal(seed + 1)];
  const labels = Int32Array.from({ length: rows }, (_, r) => r % TASK.classes);
  const [x, y] = [new Float64Array(rows), new Float64Array(rows)];
  labels.forEach((label, r) => {
    const radius = 0.05 + 0.95 * along();
    const angle = 2 * Math.PI * (label / TASK.classes + TASK.turns * radius) + TASK.noise * noise();
    [x[r], y[r]] = [radius * Math.cos(angle), radius * Math.sin(angle)];
  });
  const [u, v] = [standardized(x), standardized(y)];
  return { points: Float64Array.from({ length: 2 * rows }, (_, k) => (k % 2 ? v : u)[k >> 1]), labels };
}

function standardized(values) {
  const mean = values.reduce((sum, value) => sum + value / values.length, 0);
  const variance = values.reduce((sum, value) => sum + (value - mean) ** 2 / values.length, 0);
  return values.map((value) => (value - mean) / Math.sqrt(variance));
}

// The points to learn from, those to be tested with, and the batches of a seed: both arms get the same.
export function task(seed) {
  if (last.seed !== seed) last = { seed, ...prepared(seed) };
  return last;
}

let last = {};

function prepared(seed) {
  const [data, test] = [spiral(4 * seed), spiral(4 * seed + 2)];
  const next = uniform(1000 + seed);
  const batches = [];
  let order = [];
  for (let step = 0; step <= TASK.steps; step++) {
    if (order.length < TASK.batch) order = shuffled(data.labels.length, next);
    const rows = order.splice(0, TASK.batch);
    batches.push({ x: Float64Array.from(rows.flatMap((r) => [data.points[2 * r], data.points[2 * r + 1]])), labels: Int32Array.from(rows, (r) => data.labels[r]) });
  }
  return { data, test, batches };
}

// Fisher and Yates.
function shuffled(count, next) {
  const order = Array.from({ length: count }, (_, k) => k);
  for (let k = count - 1; k > 0; k--) {
    const other = Math.floor(next() * (k + 1));
    [order[k], order[other]] = [order[other], order[k]];
  }
  return order;
}

// What is seen of a training every few steps: the loss of the batch, the accuracy on the test points in inference, the norm of the gradient
// of each layer's weights, and the model as it was. It ends early if the loss is not a number or `enough` says so of what was seen.
export function train({ rate, seed, normalized, steps = TASK.steps, enough = () => false }) {
  const { test, batches } = task(seed);
  const model = network(SIZES, { normalized, activation: "relu", initialization: "he" }, normal(2000 + seed));
  const seen = [];
  for (const [step, { x, labels }] of batches.entries()) {
    const { logits, trace } = forward(model, x, labels.length, true);
    const { loss, gradient } = crossEntropy(logits, labels);
    const gradients = backward(model, trace, gradient, labels.length);
    const broken = !Number.isFinite(loss);
    if (step % TASK.every === 0 || broken) {
      const tested = forward(model, test.points, test.labels.length).logits;
      seen.push({ step, loss, accuracy: accuracy(tested, test.labels), norms: gradientNorms(gradients), model: structuredClone(model) });
    }
    if (broken || step === steps || (seen.at(-1).step === step && enough(seen.at(-1)))) break;
    descend(model, gradients, rate);
  }
  return seen;
}

const reached = ({ accuracy: share }) => share >= TASK.target;

// The first of the seen steps at which the accuracy reaches the target, or null.
export const stepsToTarget = (seen) => seen.find(reached)?.step ?? null;

// The same of a training that goes no further.
export const reaches = (settings) => stepsToTarget(train({ ...settings, enough: reached }));
