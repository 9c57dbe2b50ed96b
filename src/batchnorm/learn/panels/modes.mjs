// Two modes: running statistics learn from the batches, and inference normalizes with them.

import { choice, diagnosisFile, play, range, toggle } from "../controls.mjs";
import { histogram, mean, variance } from "../mathematics.mjs";
import { ownModel, ownWords } from "../own.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { drift, POPULATION, STEPS, testing, training, weight } from "../running.mjs";

const SPAN = [-8, 10];
const BINS = 72;

export const modes = {
  id: "modes",
  controls: [
    range("step", { min: 0, max: STEPS, value: 20 }),
    play("play", "step", { every: 150 }),
    range("momentum", { min: 0.01, max: 0.9, step: 0.01, value: 0.1 }),
    choice("convention", ["torch", "keras"]),
    range("m", { min: 2, max: 64, value: 16 }),
    toggle("forget"),
    range("shift", { min: -5, max: 5, step: 0.1, value: 0 }),
    diagnosisFile(),
  ],
  guess: { options: ["once", "twenty", "never", "unsure"], answer: "twenty" },
  check: { options: ["centered", "shifted", "depends"], answer: "shifted" },

  draw(state, tools) {
    const key = [tools.t("key.running"), tools.t("key.batch"), tools.t("key.population")];
    return [
      tools.figure(tools.t("means"), [seriesKey(key), series("mean", state, tools)], { half: true }),
      tools.figure(tools.t("variances"), [seriesKey(key), series("variance", state, tools)], { half: true }),
      tools.figure(tools.t(state.forget ? "outputs.forgotten" : "outputs"), [outputsKey(state, tools), outputs(state, tools)]),
      ...ownModel(tools, "modes"),
    ];
  },

  describe(state, tools) {
    const { t, number } = tools;
    const { statistics, evaluated, trained, gap, after } = testing(state);
    const share = weight(state);
    return [
      t("words.training", { step: String(state.step), m: String(state.m), mean: statistics.mean, variance: statistics.variance, population: POPULATION.mean, spread: POPULATION.deviation ** 2, drift: number(drift(statistics), 3) }),
      t("words.weight", { convention: t(`convention.${state.convention}`), momentum: state.momentum, weight: share, batches: String(Math.ceil(Math.log(0.1) / Math.log(1 - share) - 1e-9)) }),
      t("words.test", { shift: state.shift, evaluated: mean(evaluated), deviation: Math.sqrt(variance(evaluated)), trained: near(mean(trained)), gap }),
      state.forget ? t("words.forgotten", { mean: after.mean, variance: after.variance }) : t("words.remembered"),
      ...ownWords(tools, "modes"),
    ];
  },
};

const near = (value) => (Math.abs(value) < 1e-9 ? 0 : value);
const seriesKey = ([running, batch, population]) => legend([[COLORS.batchNorm, running], [COLORS.muted, batch, "2 4"], [COLORS.ink, population, "5 3"]]);

// A running statistic by batch, up to the present one, among those of the batches.
function series(name, state, { t, number, half }) {
  const { path, batches } = training(state);
  const truth = name === "mean" ? POPULATION.mean : POPULATION.deviation ** 2;
  const domain = name === "mean" ? [-0.5, 4.5] : [0, 6];
  const chart = new Chart({ width: half, height: 220, label: t(`${name}s`), x: { domain: [0, STEPS], label: t("axis.batches") }, y: { domain, label: t(`axis.${name}`) } });
  chart.rule("y", truth, { color: COLORS.ink, dash: "5 3" });
  const inside = (value) => Math.min(Math.max(value, domain[0]), domain[1]);
  chart.dots(batches.slice(0, state.step).map((batch, i) => [i + 1, inside(batch[name])]), { color: COLORS.muted, radius: 2, opacity: 0.55 });
  chart.line(path.slice(0, state.step + 1).map((statistics, i) => [i, statistics[name]]), { color: COLORS.batchNorm, width: 2.2 });
  chart.dots([[state.step, inside(path[state.step][name])]], { color: COLORS.batchNorm, radius: 5 });
  return chart.values(path.slice(0, state.step + 1).map((_, i) => i), (i) => t("at", { batch: String(i), value: number(path[i][name]) })).svg;
}

const outputsKey = ({ forget }, { t }) => legend([[COLORS.batchNorm, t("key.evaluated") + (forget ? "" : t("key.used"))], [COLORS.plain, t("key.trained") + (forget ? t("key.used") : "")]]);

// Outputs for the test batch in both modes; what the model uses is filled.
function outputs(state, { t, width }) {
  const { evaluated, trained } = testing(state);
  const size = (SPAN[1] - SPAN[0]) / BINS;
  const counted = { evaluated: histogram(evaluated, ...SPAN, BINS), trained: histogram(trained, ...SPAN, BINS) };
  const most = Math.max(...counted.evaluated, ...counted.trained) * 1.12;
  const chart = new Chart({ width, height: 200, label: t("outputs"), x: { domain: SPAN, label: t("axis.output") }, y: { domain: [0, most] } });
  const one = (name, color, used) => {
    const counts = counted[name];
    if (used) chart.bars(counts.map((count, i) => [SPAN[0] + i * size, SPAN[0] + (i + 1) * size, count]), { color, opacity: 0.4 });
    chart.line(counts.flatMap((count, i) => [[SPAN[0] + i * size, count], [SPAN[0] + (i + 1) * size, count]]), { color, width: used ? 2 : 1.4, dash: used ? undefined : "4 3" });
  };
  one("evaluated", COLORS.batchNorm, !state.forget);
  one("trained", COLORS.plain, state.forget);
  const bins = counted.evaluated.map((_, i) => SPAN[0] + (i + 0.5) * size);
  return chart.values(bins, (_, i) => t("bar", { evaluated: String(counted.evaluated[i]), trained: String(counted.trained[i]) })).svg;
}
