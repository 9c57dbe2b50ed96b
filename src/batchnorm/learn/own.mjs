// The reader's own model, from a diagnosis: its batch norms, and the findings that a panel explains.

import { make, rich } from "./dom.mjs";
import { Chart, COLORS, legend } from "./plot.mjs";
import { table } from "./table.mjs";

const MOST = 12; // layers in the table

const worstFirst = (layers) => Object.entries(layers).sort(([, a], [, b]) => (b.drift ?? -1) - (a.drift ?? -1));
const named = (name, t) => name || t("own.root");
const explained = ({ diagnosis, panelOf }, panel) => diagnosis.findings.filter(({ code }) => panelOf(code) === panel);

// Figures for panel `panel`; none without a diagnosis.
export function ownModel(tools, panel) {
  const { diagnosis, number, figure, frame: t } = tools;
  if (!diagnosis) return [];
  const cell = (value) => (typeof value === "number" ? number(value, 3) : value ?? "–");
  const all = worstFirst(diagnosis.layers);
  const rows = all.slice(0, MOST).map(([name, row]) => [named(name, t), ...["class", "batches", "drift", "effective_samples"].map((key) => String(cell(row[key])))]);
  const more = all.length > MOST ? [make("p", { class: "formula" }, t("own.more", { more: String(all.length - MOST) }))] : [];
  const findings = explained(tools, panel).map((each) => make("li", {}, make("strong", {}, each.code), ` ${each.layers.slice(0, 3).map((name) => named(name, t)).join(", ")}: ${each.message}. `, make("code", {}, each.remedy)));
  const others = diagnosis.findings.filter(({ code }) => ![panel, undefined].includes(tools.panelOf(code)));
  const links = others.flatMap(({ code }) => [" ", make("a", { href: `#panel=${tools.panelOf(code)}` }, code)]);
  return [
    figure(t("own.layers"), [table(t("own.layers"), [t("own.layer"), t("own.class"), t("own.batches"), t("own.drift"), t("own.samples")], rows), ...more]),
    ...channels(all, tools),
    figure(t("own.findings"), [make("ul", { class: "findings" }, ...(findings.length ? findings : [make("li", {}, t("own.none"))])), ...(links.length ? [make("p", { class: "formula" }, ...rich(t("own.elsewhere")), ...links)] : [])]),
  ];
}

// Mean ± deviation of the data and of the running statistics, for channels of the worst layer, from the nearest to the farthest.
function channels(layers, { frame: t, number, figure, width }) {
  const [name, row] = layers.find(([, each]) => each.quantiles?.length) ?? [];
  if (!row) return [];
  const found = row.quantiles.map((each) => ({ ...each, data: [each.mean, each.deviation], running: [each.running_mean, each.running_deviation] }));
  const ends = found.flatMap(({ data, running }) => [data, running].flatMap(([mean, deviation]) => [mean - deviation, mean + deviation])).filter(Number.isFinite);
  const pad = 0.05 * (Math.max(...ends) - Math.min(...ends)) || 1;
  const chart = new Chart({ width, height: 60 + 34 * found.length, label: t("own.channels", { layer: named(name, t) }), x: { domain: [Math.min(...ends) - pad, Math.max(...ends) + pad], label: t("own.value") }, y: { domain: [found.length, 0] }, margin: { left: 84, top: 4 } });
  found.forEach(({ channel, data, running }, i) => {
    chart.text(chart.left - 12, chart.y(i + 0.5) + 4, t("own.channel", { channel: String(channel) }), { anchor: "end" });
    [[data, COLORS.muted, 0.36], [running, COLORS.batchNorm, 0.64]].forEach(([[mean, deviation], color, down]) => {
      chart.line([[mean - deviation, i + down], [mean + deviation, i + down]], { color, width: 3 });
      chart.dots([[mean, i + down, `${number(mean)} ± ${number(deviation)}`]], { color, radius: 5 });
    });
  });
  return [figure(t("own.channels", { layer: named(name, t) }), [legend([[COLORS.muted, t("own.data")], [COLORS.batchNorm, t("own.running")]]), chart.svg])];
}

// Sentences about it; none without a diagnosis.
export function ownWords(tools, panel) {
  const { diagnosis, number, frame: t } = tools;
  if (!diagnosis) return [];
  const [[name, { drift }] = ["", {}]] = worstFirst(diagnosis.layers);
  const codes = explained(tools, panel).map(({ code }) => code).join(", ") || t("own.no-code");
  const layers = t("own.words", { layers: String(Object.keys(diagnosis.layers).length), codes });
  return [layers, ...(drift === undefined ? [] : [t("own.worst", { layer: named(name, t), drift: number(drift, 3) })])];
}
