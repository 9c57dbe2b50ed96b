// Which normalization: a list of questions, asked in order. The first that is answered with yes decides; if none is, the last leaf does.

export const FEW = 16; // samples of a normalization batch; a rule of thumb

export const QUESTIONS = [
  { id: "text", leaf: "layer", yes: ({ task }) => task === "text" },
  { id: "rl", leaf: "layer", yes: ({ task }) => task === "rl" },
  { id: "small", leaf: "none", yes: ({ task }) => task === "small" },
  { id: "tuned", leaf: "frozen", yes: ({ tune, batch }) => tune && batch < FEW },
  { id: "mixed", leaf: "renorm", yes: ({ order }) => order !== "shuffled" },
  { id: "enough", leaf: "bn", yes: ({ batch }) => batch >= FEW },
  { id: "sync", leaf: "sync", yes: ({ batch, devices }) => batch * devices >= FEW },
  { id: "fold", leaf: "renorm", yes: ({ deployment }) => deployment === "fold" },
];

export const LAST = "group";

// The place of the question that decides (or their number) and the leaf.
export function decide(state) {
  const place = QUESTIONS.findIndex(({ yes }) => yes(state));
  return place < 0 ? { place: QUESTIONS.length, leaf: LAST } : { place, leaf: QUESTIONS[place].leaf };
}

// What the statistics of a leaf become in a deployed model: they fold into the weights, or are computed for each sample, or there are none.
export const DEPLOYED = { bn: "folds", sync: "folds", frozen: "folds", renorm: "folds", group: "stays", layer: "stays", none: "nothing" };

// The question to which a finding of `batchnorm diagnose` points; the other findings have nothing to do with this choice.
export const POINTS = {
  BN302: "tuned", BN304: "tuned", BN401: "enough", BN402: "enough", BN403: "enough", BN407: "enough", BN404: "mixed", BN405: "mixed", BN406: "mixed", BN611: "sync", BN603: "fold",
};

export const pointsTo = (code) => POINTS[code];

// The lab's evidence for a decision: an experiment, rows [metric, arm], the kind of number, and whether lower is better.
export const EVIDENCE = {
  image: { experiment: "image-classification", rows: [["accuracy_vgg", "plain"], ["accuracy_vgg", "he"], ["accuracy_vgg", "batch_norm"]], unit: "share" },
  detection: { experiment: "detection", rows: [["precision", "none"], ["precision", "both"]], unit: "number" },
  speech: { experiment: "speech", rows: [["letters", "none"], ["letters", "both"], ["letters", "per_step"]], unit: "share", lower: true },
  gan: { experiment: "gan", rows: [["distance", "tuned"], ["distance", "both"], ["distance", "joint"], ["distance", "domains"]], unit: "number", lower: true },
  text: { experiment: "translation", rows: [["right", "none"], ["right", "batch_norm"], ["right", "layer_norm"]], unit: "share" },
  rl: { experiment: "dqn", rows: [["mean_return", "joint"], ["mean_return", "target"], ["mean_return", "layer_norm"]], unit: "number" },
  small: { experiment: "image-classification", rows: [["accuracy_alexnet", "he"], ["accuracy_alexnet", "batch_norm"]], unit: "share" },
  tuned: { experiment: "batch-size", rows: [["noise_2", "plain"], ["noise_2", "frozen"], ["noise_2", "group_norm"]], unit: "share", lower: true },
  mixed: { experiment: "batch-size", rows: [["sorted_4", "plain"], ["sorted_4", "renorm"], ["sorted_4", "moving_average"], ["sorted_4", "group_norm"]], unit: "share", lower: true },
  sync: { experiment: "batch-size", rows: [["noise_2", "plain"], ["noise_64", "plain"]], unit: "share", lower: true },
  fold: { experiment: "batch-size", rows: [["noise_2", "plain"], ["noise_2", "renorm"], ["noise_2", "moving_average"], ["noise_2", "group_norm"]], unit: "share", lower: true },
  last: { experiment: "batch-size", rows: [["noise_2", "plain"], ["noise_2", "group_norm"], ["noise_64", "plain"], ["noise_64", "group_norm"]], unit: "share", lower: true },
};

// Its name is that of the question that decides, and where batch normalization is the answer, that of the task.
export function evidence(state) {
  const question = QUESTIONS[decide(state).place]?.id ?? "last";
  const name = question === "enough" ? state.task : question;
  return { name, ...EVIDENCE[name] };
}
