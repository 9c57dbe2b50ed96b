// Is it the shift? Recorded runs of the lab's experiment `smoothness`: noise after batch normalization makes inputs move more than without
// batch normalization, and the benefit stays.

import { choice, toggle } from "../controls.mjs";
import { normal } from "../random.mjs";
import { Chart, COLORS, legend } from "../plot.mjs";
import { RECORDED } from "../recorded.mjs";

const COLOR = { plain: COLORS.plain, batch_norm: COLORS.batchNorm, noisy: COLORS.purple };
const NOISE = 0.25; // of the lab's experiment: a unit times 1 + 0.25 N(0, 1), plus 0.25 N(0, 1), anew at each step
const STEPS = 8;
const TURN = { he: "turn", usual: "usual_turn" };

export const shift = {
  id: "shift",
  controls: [toggle("noise"), toggle("each"), choice("initialization", ["he", "usual"])],
  guess: { options: ["lost", "half", "stays", "unsure"], answer: "stays" },
  check: { options: ["proven", "not", "useless"], answer: "not" },

  draw(state, tools) {
    const { t, figure } = tools;
    return [
      figure(t("unit"), [unit(state, tools)], { half: true }),
      figure(t("moved"), [seeds(state, "moved", tools)], { half: true }),
      figure(t("course"), [legend(arms(state).map((arm) => [COLOR[arm], t(`arm.${arm}`)])), course(state, tools)]),
      figure(t("turn", { initialization: t(`initialization.${state.initialization}`) }), [seeds(state, TURN[state.initialization], tools)]),
    ];
  },

  describe(state, { t, list }) {
    const { accuracy, moved } = values();
    const said = arms(state).map((arm) => t("words.arm", { arm: t(`arm.${arm}`), accuracy: state.each ? accuracy[arm].map(percent).join(", ") : percent(mean(accuracy[arm])), moved: list(state.each ? moved[arm] : [mean(moved[arm])], 2) }));
    const turned = values()[TURN[state.initialization]];
    const turn = t("words.turn", { initialization: t(`initialization.${state.initialization}`), plain: list(state.each ? turned.plain : [mean(turned.plain)], 2), bn: list(state.each ? turned.batch_norm : [mean(turned.batch_norm)], 2) });
    const { command, date } = RECORDED.made.smoothness;
    return [t(state.noise ? "words.noise" : "words.quiet"), ...said, turn, t("words.made", { command: `\`${command}\``, date })].join(" ");
  },
};

const values = () => RECORDED.values.smoothness;
const arms = (state) => ["plain", "batch_norm", ...(state.noise ? ["noisy"] : [])];
const mean = (numbers) => numbers.reduce((sum, value) => sum + value / numbers.length, 0);
const percent = (value) => `${Math.round(1000 * value) / 10}%`;

// The distribution of what a unit gives in several steps: after batch normalization it is the same at each, with noise it is not.
function unit(state, { t, half }) {
  const chart = new Chart({ width: half, height: 200, label: t("unit"), x: { domain: [-4, 4], label: t("axis.unit") }, y: { domain: [0, 0.62] } });
  const next = normal(5);
  for (let step = 1; step <= STEPS; step++) {
    const [shifted, stretched] = state.noise ? [NOISE * next(), 1 + NOISE * next()] : [0, 1];
    const points = Array.from({ length: 81 }, (_, i) => -4 + i / 10).map((at) => [at, Math.exp(-0.5 * ((at - shifted) / stretched) ** 2) / (stretched * Math.sqrt(2 * Math.PI))]);
    chart.line(points, { color: state.noise ? COLOR.noisy : COLOR.batch_norm, width: 1.3 });
  }
  return chart.svg;
}

function course(state, { t, width }) {
  const curves = RECORDED.curves.smoothness.course;
  const steps = curves.plain[0].map(([step]) => step);
  const chart = new Chart({ width, height: 240, label: t("course"), x: { domain: [0, steps.at(-1)], label: t("axis.step") }, y: { domain: [0, 1], label: t("axis.accuracy") } });
  const averages = Object.fromEntries(arms(state).map((arm) => [arm, steps.map((step, i) => [step, mean(curves[arm].map((points) => points[i][1]))])]));
  for (const arm of arms(state)) {
    if (state.each) curves[arm].forEach((points) => chart.line(points, { color: COLOR[arm], width: 1 }));
    else chart.line(averages[arm], { color: COLOR[arm] });
  }
  return chart.values(steps, (step, i) => [`${t("axis.step")} ${step}`, ...arms(state).map((arm) => `${t(`arm.${arm}`)}: ${percent(averages[arm][i][1])}`)].join("\n")).svg;
}

// A row of dots for each arm, one a seed, on a logarithmic axis.
function seeds(state, metric, { t, half, width, number }) {
  const shown = arms(state);
  const all = shown.flatMap((arm) => values()[metric][arm]);
  const domain = [10 ** Math.floor(Math.log10(Math.min(...all))), 10 ** Math.ceil(Math.log10(Math.max(...all)))];
  const chart = new Chart({ width: metric === "moved" ? half : width, height: metric === "moved" ? 200 : 60 + 34 * shown.length, label: t(`axis.${metric}`), x: { domain, log: true, label: t(`axis.${metric}`) }, y: { domain: [shown.length, 0] }, margin: { left: 92 } });
  shown.forEach((arm, row) => {
    const own = values()[metric][arm];
    chart.text(84, chart.y(row + 0.5) + 4, t(`arm.${arm}`), { anchor: "end", color: COLOR[arm] });
    const dots = state.each ? own.map((value) => [value, row + 0.5, number(value, 3)]) : [[mean(own), row + 0.5, number(mean(own), 3)]];
    chart.line([[domain[0], row + 0.5], [domain[1], row + 0.5]], { color: COLORS.grid, width: 0.8 });
    chart.dots(dots, { color: COLOR[arm], radius: 5, opacity: state.each ? 0.75 : 1 });
  });
  return chart.svg;
}
