// Batch normalization of one channel, in the notation of Ioffe & Szegedy (2015, arXiv:1502.03167). Tested against `bn.explain` and
// `batchnorm.reference` (tests/test_learn.py).

export const sum = (values) => values.reduce((total, value) => total + value, 0);
export const mean = (values) => sum(values) / values.length;

// Biased: divided by m.
export function variance(values) {
  const center = mean(values);
  return mean(values.map((value) => (value - center) ** 2));
}

// Algorithm 1, every step.
export function forward(values, gamma = 1, beta = 0, eps = 1e-5) {
  const mu = mean(values);
  const deviations = values.map((value) => value - mu);
  const sigma2 = mean(deviations.map((value) => value * value));
  const std = Math.sqrt(sigma2 + eps);
  const normalized = deviations.map((value) => value / std);
  return { mean: mu, deviations, variance: sigma2, std, normalized, output: normalized.map((value) => gamma * value + beta) };
}

// Section 3: dL/dx is the sum of a path through x̂ directly, one through the variance and one through the mean.
export function backward(values, upstream, gamma = 1, eps = 1e-5) {
  const m = values.length;
  const { deviations, std, normalized } = forward(values, gamma, 0, eps);
  const gradNormalized = upstream.map((grad) => grad * gamma);
  const gradVariance = sum(gradNormalized.map((grad, i) => grad * deviations[i] * -0.5 * std ** -3));
  const gradMean = sum(gradNormalized.map((grad) => -grad / std)) + (gradVariance * sum(deviations.map((value) => -2 * value))) / m;
  const direct = gradNormalized.map((grad) => grad / std);
  const throughVariance = deviations.map((value) => (gradVariance * 2 * value) / m);
  const throughMean = values.map(() => gradMean / m);
  return {
    direct, throughVariance, throughMean, gradVariance, gradMean,
    input: direct.map((grad, i) => grad + throughVariance[i] + throughMean[i]),
    gamma: sum(upstream.map((grad, i) => grad * normalized[i])),
    beta: sum(upstream),
  };
}

// dL/dx by central differences of L = Σ dL/dyᵢ · yᵢ, which needs no formula of the backward.
export function finiteDifferences(values, upstream, gamma = 1, eps = 1e-5, h = 1e-5) {
  const loss = (x) => sum(forward(x, gamma, 0, eps).output.map((y, i) => upstream[i] * y));
  return values.map((value, i) => (loss(values.with(i, value + h)) - loss(values.with(i, value - h))) / (2 * h));
}

// Algorithm 2: with statistics that do not depend on the batch.
export const inference = (values, mu, sigma2, gamma = 1, beta = 0, eps = 1e-5) =>
  values.map((value) => (gamma * (value - mu)) / Math.sqrt(sigma2 + eps) + beta);

// Running statistics after one more batch; `weight` is that of the new value, and the variance is the unbiased one unless told otherwise.
export function running({ mean: mu, variance: sigma2 }, values, weight, unbiased = true) {
  const m = values.length;
  const correction = unbiased ? m / (m - 1) : 1;
  return { mean: (1 - weight) * mu + weight * mean(values), variance: (1 - weight) * sigma2 + weight * correction * variance(values) };
}

// Counts of values in equal bins over [low, high]; values beyond are counted in the outer bins.
export function histogram(values, low, high, bins) {
  const counts = Array(bins).fill(0);
  for (const value of values) counts[Math.min(Math.max(Math.floor(((value - low) / (high - low)) * bins), 0), bins - 1)] += 1;
  return counts;
}
