// Training and inference of one batch norm, simulated: mini-batches come, running statistics follow, and test data meet both modes.

import { forward, inference, mean, running, variance } from "./mathematics.mjs";
import { normal, several } from "./random.mjs";

export const POPULATION = { mean: 2, deviation: 1.5 };
export const EPS = 1e-5;
export const STEPS = 120;
const TEST_SIZE = 256;

const draw = (count, seed, shift = 0) => {
  const next = normal(seed);
  return several(count, () => POPULATION.mean + shift + POPULATION.deviation * next());
};

// PyTorch's momentum weighs the new value and it keeps the unbiased variance; that of Keras 3 weighs the old value, and it keeps the biased one.
export const weight = ({ momentum, convention }) => (convention === "torch" ? momentum : 1 - momentum);

// Running statistics after 0, 1, 2 ... batches, beginning at mean 0 and variance 1, and the statistics of each batch.
export function training({ momentum, convention, m }, steps = STEPS) {
  const path = [{ mean: 0, variance: 1 }];
  const batches = [];
  for (let step = 0; step < steps; step += 1) {
    const values = draw(m, 100 * step + 7);
    batches.push({ mean: mean(values), variance: variance(values) * (convention === "torch" ? m / (m - 1) : 1) });
    path.push(running(path.at(-1), values, weight({ momentum, convention }), convention === "torch"));
  }
  return { path, batches };
}

// A test batch in both modes. In training mode it also changes the running statistics.
export function testing(state) {
  const statistics = training(state, state.step).path.at(-1);
  const values = draw(TEST_SIZE, 4, state.shift);
  const evaluated = inference(values, statistics.mean, statistics.variance, 1, 0, EPS);
  const trained = forward(values, 1, 0, EPS).output;
  const gap = mean(evaluated.map((value, i) => Math.abs(value - trained[i])));
  return { statistics, values, evaluated, trained, gap, after: running(statistics, values, weight(state), state.convention === "torch") };
}

// Nats from a Gaussian with these statistics to that of the data, as in rule BN201 of `diagnose`.
export function drift(statistics, data = { mean: POPULATION.mean, variance: POPULATION.deviation ** 2 }) {
  const ratio = data.variance / statistics.variance;
  return 0.5 * (ratio + (data.mean - statistics.mean) ** 2 / statistics.variance - 1 - Math.log(ratio));
}
