// A plain multilayer perceptron in float64, with or without batch normalization: forward, backward, one step of gradient descent.
//
// A matrix is a Float64Array with its rows one after the other. Layer l computes z = a W^T + b (rows x outputs), then, if the network is
// normalized and the layer is not the last, BN of z, then the activation. Weights are (outputs x inputs), as in torch.

export const EPS = 1e-5;
export const MOMENTUM = 0.1; // weighs the new value, as in torch

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

// Each activation, and its derivative as a function of its output.
export const ACTIVATIONS = {
  relu: { of: (x) => (x > 0 ? x : 0), slope: (y) => (y > 0 ? 1 : 0) },
  tanh: { of: Math.tanh, slope: (y) => 1 - y * y },
  sigmoid: { of: sigmoid, slope: (y) => y * (1 - y) },
};

// Standard deviation of the initial weights of a layer with `inputs` and `outputs` units.
export const INITIALIZATIONS = {
  small: () => 0.01,
  xavier: (inputs, outputs) => Math.sqrt(2 / (inputs + outputs)),
  he: (inputs) => Math.sqrt(2 / inputs),
  large: () => 1,
};

// A network of the given layer sizes with zero biases and weights from `next`, which gives standard normal numbers.
export function network(sizes, { normalized, activation, initialization }, next) {
  const layers = [];
  for (let l = 1; l < sizes.length; l++) {
    const [inputs, outputs] = [sizes[l - 1], sizes[l]];
    const deviation = INITIALIZATIONS[initialization](inputs, outputs);
    const layer = {
      inputs,
      outputs,
      weight: Float64Array.from({ length: inputs * outputs }, () => deviation * next()),
      bias: new Float64Array(outputs),
      norm: null,
    };
    if (normalized && l < sizes.length - 1) {
      layer.norm = {
        gamma: new Float64Array(outputs).fill(1),
        beta: new Float64Array(outputs),
        runningMean: new Float64Array(outputs),
        runningVar: new Float64Array(outputs).fill(1),
      };
    }
    layers.push(layer);
  }
  return { layers, activation };
}

function linear({ weight, bias, inputs, outputs }, a, rows) {
  const z = new Float64Array(rows * outputs);
  for (let r = 0; r < rows; r++) {
    for (let o = 0; o < outputs; o++) {
      let sum = bias[o];
      for (let i = 0, w = o * inputs, x = r * inputs; i < inputs; i++) sum += weight[w + i] * a[x + i];
      z[r * outputs + o] = sum;
    }
  }
  return z;
}

// Mean and biased variance of each column, the variance from deviations about the mean.
function columnMoments(z, rows, columns) {
  const mean = new Float64Array(columns);
  const variance = new Float64Array(columns);
  for (let k = 0; k < z.length; k++) mean[k % columns] += z[k] / rows;
  for (let k = 0; k < z.length; k++) variance[k % columns] += (z[k] - mean[k % columns]) ** 2 / rows;
  return { mean, variance };
}

// What batch normalization makes of z, and what its backward needs. Training uses the statistics of z and updates the running ones.
function normalize(norm, z, rows, training) {
  const columns = norm.gamma.length;
  let [mean, variance] = [norm.runningMean, norm.runningVar];
  if (training) {
    ({ mean, variance } = columnMoments(z, rows, columns));
    for (let c = 0; c < columns; c++) {
      norm.runningMean[c] += MOMENTUM * (mean[c] - norm.runningMean[c]);
      norm.runningVar[c] += MOMENTUM * ((variance[c] * rows) / (rows - 1) - norm.runningVar[c]);
    }
  }
  const reciprocal = variance.map((value) => 1 / Math.sqrt(value + EPS));
  const normalized = z.map((value, k) => (value - mean[k % columns]) * reciprocal[k % columns]);
  const output = normalized.map((value, k) => norm.gamma[k % columns] * value + norm.beta[k % columns]);
  return { normalized, reciprocal, output };
}

// The logits of `rows` samples and what every layer saw: its input, what the activation received, and what it gave.
export function forward({ layers, activation }, x, rows, training = false) {
  const { of } = ACTIVATIONS[activation];
  const trace = [];
  let a = x;
  layers.forEach((layer, l) => {
    const z = linear(layer, a, rows);
    const normal = layer.norm && normalize(layer.norm, z, rows, training);
    const received = normal ? normal.output : z;
    const given = l < layers.length - 1 ? received.map(of) : received;
    trace.push({ input: a, normal, received, given });
    a = given;
  });
  return { logits: a, trace };
}

// Mean cross entropy of the logits, and its gradient.
export function crossEntropy(logits, labels) {
  const rows = labels.length;
  const classes = logits.length / rows;
  const gradient = new Float64Array(logits.length);
  let loss = 0;
  for (let r = 0; r < rows; r++) {
    const row = logits.subarray(r * classes, (r + 1) * classes);
    const top = Math.max(...row);
    const exps = row.map((value) => Math.exp(value - top));
    const sum = exps.reduce((a, b) => a + b, 0);
    loss += (Math.log(sum) + top - row[labels[r]]) / rows;
    for (let c = 0; c < classes; c++) gradient[r * classes + c] = (exps[c] / sum - (c === labels[r] ? 1 : 0)) / rows;
  }
  return { loss, gradient };
}

// The gradient through the statistics of the batch: all rows of a column are tied together by its mean and its variance.
function normalizeBackward(norm, { normalized, reciprocal }, dy, rows) {
  const columns = norm.gamma.length;
  const [dgamma, dbeta] = [new Float64Array(columns), new Float64Array(columns)];
  for (let k = 0; k < dy.length; k++) {
    dbeta[k % columns] += dy[k];
    dgamma[k % columns] += dy[k] * normalized[k];
  }
  const dz = dy.map((value, k) => {
    const c = k % columns;
    return norm.gamma[c] * reciprocal[c] * (value - dbeta[c] / rows - (normalized[k] * dgamma[c]) / rows);
  });
  return { dz, dgamma, dbeta };
}

// The gradients of all parameters, one object for each layer, from the gradient of the logits.
export function backward({ layers, activation }, trace, dlogits, rows) {
  const { slope } = ACTIVATIONS[activation];
  const gradients = [];
  let dgiven = dlogits;
  for (let l = layers.length - 1; l >= 0; l--) {
    const { inputs, outputs, weight, norm } = layers[l];
    const { input, normal, given } = trace[l];
    const last = l === layers.length - 1;
    const dreceived = last ? dgiven : dgiven.map((value, k) => value * slope(given[k]));
    const through = norm ? normalizeBackward(norm, normal, dreceived, rows) : { dz: dreceived };
    const gradient = { weight: new Float64Array(weight.length), bias: new Float64Array(outputs), ...through };
    const dinput = new Float64Array(rows * inputs);
    for (let r = 0; r < rows; r++) {
      for (let o = 0; o < outputs; o++) {
        const d = through.dz[r * outputs + o];
        gradient.bias[o] += d;
        for (let i = 0, w = o * inputs, x = r * inputs; i < inputs; i++) {
          gradient.weight[w + i] += d * input[x + i];
          dinput[x + i] += d * weight[w + i];
        }
      }
    }
    gradients[l] = gradient;
    dgiven = dinput;
  }
  return gradients;
}

const euclidean = (values) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));

// The norm of the gradient of each layer's weights.
export const gradientNorms = (gradients) => gradients.map(({ weight }) => euclidean(weight));

// The root of the mean square of what each layer gives: 1 for activations of unit size, whatever the width.
export const activationSizes = (trace) => trace.map(({ given }) => euclidean(given) / Math.sqrt(given.length));

// One step of plain stochastic gradient descent, in place.
export function descend({ layers }, gradients, rate) {
  const move = (values, slopes) => values.forEach((_, k) => (values[k] -= rate * slopes[k]));
  layers.forEach(({ weight, bias, norm }, l) => {
    move(weight, gradients[l].weight);
    move(bias, gradients[l].bias);
    if (norm) {
      move(norm.gamma, gradients[l].dgamma);
      move(norm.beta, gradients[l].dbeta);
    }
  });
}

// The class of the largest logit of each row; -1 where one is not a number.
export function classes(logits, rows) {
  const columns = logits.length / rows;
  return Int32Array.from({ length: rows }, (_, r) => {
    const row = logits.subarray(r * columns, (r + 1) * columns);
    return row.indexOf(Math.max(...row));
  });
}

// The share of rows whose class is their label.
export const accuracy = (logits, labels) => classes(logits, labels.length).filter((given, r) => given === labels[r]).length / labels.length;
