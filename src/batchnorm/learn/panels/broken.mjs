// The broken layer: the tutorial's class, whose defects are mended one by one, and what was recorded when the class ran as it is shown.

import { toggle } from "../controls.mjs";
import { DEFECTS, listing, outcome, TRIALS } from "../defects.mjs";
import { make, rich } from "../dom.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { RECORDED } from "../recorded.mjs";

export const broken = {
  id: "broken",
  controls: DEFECTS.map((defect) => toggle(defect)),
  guess: { options: ["trained", "fresh", "error", "unsure"], answer: "fresh" },
  check: { options: ["error", "nan", "beta"], answer: "nan" },

  draw(state, tools) {
    const { t, figure } = tools;
    return [
      figure(t("listing"), [code(state, tools)]),
      figure(t("trials"), [table(state, tools)]),
      figure(t("memory"), [legend([[COLORS.plain, t("memory.broken")], [COLORS.batchNorm, t("memory.mended")]]), memory(state, tools)]),
    ];
  },

  describe(state, tools) {
    const { t } = tools;
    const [whole, left] = [DEFECTS.filter((defect) => state[defect]), DEFECTS.filter((defect) => !state[defect])];
    const names = (defects) => defects.map((defect) => t(defect)).join("; ");
    const wrong = Object.keys(TRIALS).filter((trial) => !right(trial, state)).map((trial) => t("words.trial", { trial: t(`trial.${trial}`), happens: happens(trial, state, tools) }));
    return [
      whole.length ? t("words.mended", { names: names(whole) }) : t("words.none"),
      left.length ? t("words.left", { names: names(left) }) : t("words.all"),
      ...wrong,
      t("words.made", { command: `\`${RECORDED.broken_made.command}\``, date: RECORDED.broken_made.date, torch: RECORDED.broken_made.torch }),
    ].join(" ");
  },
};

const mended = (state) => new Set(DEFECTS.filter((defect) => state[defect]));

// The first of the defects on which a trial depends is the one that it shows.
const right = (trial, state) => state[TRIALS[trial][0]];

function happens(trial, state, { t, number }) {
  const whole = outcome(trial, mended(state));
  const name = whole || "broken";
  const recorded = RECORDED.broken[trial][whole];
  const told = (value) => (Array.isArray(value) ? value.map(told).join(", ") : typeof value === "number" ? number(value, 3) : String(value));
  const values = Object.fromEntries(Object.entries(recorded).map(([key, value]) => [key, told(value)]));
  if (trial === "memory") values.grown = number(recorded.megabytes.at(-1), 2);
  return t(`trial.${trial}.${name}`, values);
}

function code(state, { t }) {
  const lines = listing(mended(state), { broken: t("comment.broken"), mended: t("comment.mended") });
  const kind = ({ defects }) => (defects.some((defect) => !state[defect]) ? "broken" : defects.length ? "mended" : "");
  const rows = lines.map((line) => make("span", { class: `line ${kind(line)}`, "data-value": line.defects.map((defect) => t(defect)).join("\n") || undefined }, `${line.text}\n`));
  return make("pre", { class: "code", tabindex: 0, role: "group", "aria-label": t("listing") }, make("code", {}, ...rows));
}

function table(state, tools) {
  const { t } = tools;
  const rows = Object.keys(TRIALS).map((trial) =>
    make("tr", { class: right(trial, state) ? "right" : "wrong" },
      make("th", { scope: "row" }, ...rich(t(`trial.${trial}`))), make("td", {}, make("span", { class: "mark" }, right(trial, state) ? "✓" : "✗"), " ", ...rich(happens(trial, state, tools)))));
  const head = make("tr", {}, make("th", { scope: "col" }, t("column.trial")), make("th", { scope: "col" }, t("column.happens")));
  return make("table", { class: "trials" }, make("thead", {}, head), make("tbody", {}, ...rows));
}

function memory(state, { t, number, width }) {
  const { "": leaking, detach: whole } = RECORDED.broken.memory;
  const points = ({ steps, megabytes }) => steps.map((step, i) => [step, megabytes[i]]);
  const chart = new Chart({ width, height: 200, label: t("memory"), x: { domain: [0, leaking.steps.at(-1)], label: t("axis.step") }, y: { domain: [-2, Math.ceil(Math.max(...leaking.megabytes) / 10) * 10], label: t("axis.megabytes") } });
  const [strong, faint] = [{ width: 2.6 }, { width: 1, dash: "4 3" }];
  chart.line(points(leaking), { color: COLORS.plain, ...(state.detach ? faint : strong) });
  chart.line(points(whole), { color: COLORS.batchNorm, ...(state.detach ? strong : faint) });
  return chart.values(leaking.steps, (step, i) => `${t("axis.step")} ${step}\n${t("memory.broken")}: ${number(leaking.megabytes[i], 3)} MB\n${t("memory.mended")}: ${number(whole.megabytes[i], 3)} MB`).svg;
}
