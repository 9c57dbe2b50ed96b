// A table of texts that scrolls by itself where it is too wide.

import { make } from "./dom.mjs";

// `columns` are headings; `rows` and `foot` begin with the name of the row.
export function table(label, columns, rows, foot = []) {
  const row = ([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell)));
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const parts = [make("thead", {}, head), make("tbody", {}, ...rows.map(row)), ...(foot.length ? [make("tfoot", {}, ...foot.map(row))] : [])];
  return make("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label }, make("table", {}, ...parts));
}
