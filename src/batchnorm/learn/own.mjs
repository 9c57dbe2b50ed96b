// The reader's own model, from a diagnosis: its batch norms, and the findings that a panel explains.

import { make, rich } from "./dom.mjs";
import { translator } from "./format.mjs";
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
    figure(t("own.findings"), [make("ul", { class: "findings" }, ...(findings.length ? findings : [make("li", {}, t("own.none"))])), ...(links.length ? [make("p", { class: "formula" }, ...rich(t("own.elsewhere")), ...links)] : [])]),
  ];
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
