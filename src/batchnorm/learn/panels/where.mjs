// Where: which normalization for a task, a batch, its devices and its data, with the lab's evidence and a paper's.

import { choice, diagnosisFile, range, toggle } from "../controls.mjs";
import { decide, DEPLOYED, evidence, LAST, pointsTo, QUESTIONS } from "../decision.mjs";
import { make, rich } from "../dom.mjs";
import { Chart, COLORS } from "../plot.mjs";
import { RECORDED } from "../recorded.mjs";

const DOUBLING = Math.log10(2);
const ROW = 30; // pixels of a row of evidence

export const where = {
  id: "where",
  controls: [
    choice("task", ["image", "detection", "speech", "gan", "text", "rl", "small"]), range("batch", { min: 1, max: 256, step: DOUBLING, value: 2, log: true }), range("devices", { min: 1, max: 64, step: DOUBLING, value: 1, log: true }),
    choice("order", ["shuffled", "sorted", "domains"]), toggle("tune"), choice("deployment", ["same", "fold", "elsewhere"]), diagnosisFile(),
  ],
  guess: { options: ["bn", "group", "less", "unsure"], answer: "group" },
  check: { options: ["layer", "frozen", "bn"], answer: "frozen" },

  draw(state, tools) {
    const { t, figure } = tools;
    return [
      figure(t("tree"), [tree(state, tools)]),
      figure(t("advice"), advice(state, tools).map((text) => make("p", {}, ...rich(text)))),
      figure(t(`evidence.${evidence(state).name}`), [bars(state, tools), make("p", { class: "formula" }, ...rich(source(state, tools)))]),
    ];
  },

  describe(state, tools) {
    const { t } = tools;
    const { place, leaf } = decide(state);
    const path = QUESTIONS.slice(0, place + 1).map(({ id }, i) => t("words.step", { question: t(`question.${id}`), answer: t(i < place ? "no" : "yes") }));
    const rows = measured(state).map(({ metric, arm, middle, low, high }) => t("words.row", { label: t(`row.${metric}.${arm}`), ...told({ middle, low, high }, state, tools) }));
    return [
      t("words", { task: t(`task.${state.task}`), batch: state.batch, devices: state.devices, order: t(`order.${state.order}`), tune: t(state.tune ? "yes" : "no"), deployment: t(`deployment.${state.deployment}`) }),
      ...path, t("words.leaf", { leaf: t(`leaf.${leaf}`) }), ...advice(state, tools), t("words.evidence", { title: t(`evidence.${evidence(state).name}`) }), ...rows, source(state, tools), own(tools),
    ].filter(Boolean).join(" ");
  },
};

// Questions one below the other, each with its answer and leaf; the path is lit.
function tree(state, tools) {
  const { t } = tools;
  const { place } = decide(state);
  const kind = (i) => (i < place ? "passed" : i === place ? "taken" : "off");
  const leaf = (name) => make("span", { class: "leaf" }, t(`leaf.${name}`));
  const rows = QUESTIONS.map(({ id, leaf: name }, i) =>
    make("li", { class: kind(i) }, make("span", { class: "asked" }, t(`question.${id}`), ...marks(id, tools)), make("span", { class: "answer" }, i < place ? `${t("no")} ↓` : `${t("yes")} →`), leaf(name)));
  return make("ol", { class: "tree" }, ...rows, make("li", { class: kind(QUESTIONS.length) }, make("span", { class: "asked" }, t("question.last")), make("span", { class: "answer" }, "→"), leaf(LAST)));
}

// Findings of the reader's model that point to a question.
function marks(question, { diagnosis }) {
  const codes = new Set((diagnosis?.findings ?? []).map(({ code }) => code).filter((code) => pointsTo(code) === question));
  return [...codes].map((code) => make("span", { class: "finding" }, code));
}

function own({ diagnosis, t }) {
  if (!diagnosis) return "";
  const pointing = diagnosis.findings.filter(({ code }) => pointsTo(code));
  const told = pointing.map(({ code, layers }) => t("words.finding", { code, layers: layers.slice(0, 3).join(", ") || "–", question: t(`question.${pointsTo(code)}`) }));
  return [t("words.own", { pointing: String(pointing.length), findings: String(diagnosis.findings.length) }), ...told].join(" ");
}

// What to do, and what becomes of it where the model runs.
const advice = (state, { t }) => {
  const { leaf } = decide(state);
  const { name } = evidence(state);
  const hint = ["gan", "speech", "rl", "text", "detection"].includes(name) ? [t(`hint.${name}`)] : leaf === "renorm" && state.order !== "shuffled" ? [t(`hint.${state.order}`)] : [];
  return [t(`do.${leaf}`), ...hint, t(`deployed.${state.deployment}.${DEPLOYED[leaf]}`)];
};

function measured(state) {
  const { experiment, rows } = evidence(state);
  return rows.map(([metric, arm]) => {
    const seeds = RECORDED.values[experiment][metric][arm];
    return { metric, arm, seeds, middle: seeds.reduce((sum, value) => sum + value / seeds.length, 0), low: Math.min(...seeds), high: Math.max(...seeds) };
  });
}

function told(values, state, { number }) {
  const form = evidence(state).unit === "share" ? (value) => `${Math.round(1000 * value) / 10}%` : (value) => number(value, 3);
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, form(value)]));
}

// A bar from zero to the mean, and the interval from the lowest to the highest seed.
function bars(state, tools) {
  const { t, width } = tools;
  const { name, unit, lower } = evidence(state);
  const rows = measured(state);
  const names = Math.min(190, width * 0.42);
  const largest = unit === "share" && !lower ? 1 : Math.max(...rows.map(({ high }) => high)) * 1.1;
  const chart = new Chart({ width, height: ROW * rows.length + 56, label: t(`evidence.${name}`), x: { domain: [0, largest], label: t(lower ? "axis.lower" : "axis.higher") }, y: { domain: [rows.length, 0] }, margin: { left: names + 8, top: 6 } });
  const best = (lower ? Math.min : Math.max)(...rows.map(({ middle }) => middle));
  rows.forEach(({ metric, arm, seeds, middle, low, high }, row) => {
    const label = t(`row.${metric}.${arm}`);
    const y = (share) => chart.y(row + share);
    const text = told({ middle, low, high }, state, tools);
    const shown = `${label}: ${text.middle} (${text.low} – ${text.high})`;
    chart.text(names, y(0.5) + 4, label, { anchor: "end" });
    chart.add(
      make("svg:rect", { x: chart.left, y: y(0.2), width: chart.x(middle) - chart.left, height: y(0.8) - y(0.2), fill: middle === best ? COLORS.batchNorm : COLORS.muted, opacity: 0.55, "data-value": shown }),
      make("svg:line", { x1: chart.x(low), x2: chart.x(high), y1: y(0.5), y2: y(0.5), stroke: COLORS.ink, "stroke-width": 2, "data-value": shown }),
      ...seeds.map((seed) => make("svg:circle", { cx: chart.x(seed), cy: y(0.5), r: 3, fill: COLORS.ink, "data-value": shown })));
  });
  return chart.svg;
}

function source(state, { t }) {
  const { name, experiment } = evidence(state);
  const { command, date } = RECORDED.made[experiment];
  return `${t("recorded", { experiment: `\`${experiment}\``, command: `\`${command}\``, date })} ${t(`paper.${name}`)}`;
}
