// Makes the plots of a page answer: values at the pointer and with the arrow keys, arms and seeds that can be switched, and a slider where
// a plot shows one of several trainings. The pictures come from matplotlib; the data and the ranges of the axes lie beside each as JSON
// (batchnorm/report/plots.py). Without this script the page shows the same pictures.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
// Words in the language of the page, some with {names}.
const WORDS = JSON.parse(document.getElementById("words").textContent);
const say = (word, values = {}) => WORDS[word].replace(/\{(\w+)\}/g, (_, name) => values[name]);
const number = (value, digits = 4) => String(Number(value.toPrecision(digits)));

function make(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// From a value on an axis to a coordinate of the picture; NaN outside of the axis.
function scale({ values: [low, high], places: [start, end], log }) {
  const along = log ? Math.log10 : Number;
  return (value) => {
    const share = (along(value) - along(low)) / (along(high) - along(low));
    return share > -0.001 && share < 1.001 ? start + share * (end - start) : NaN;
  };
}

class Plot {
  constructor(figure) {
    this.data = JSON.parse(figure.querySelector("script").textContent);
    this.svg = figure.querySelector("svg");
    this.place = { x: scale(this.data.x), y: scale(this.data.y) };
    this.along = this.data.along; // the axis on which one moves from point to point
    this.frame = this.data.frames?.first;
    this.hidden = new Set();
    this.seeds = new Set();
    this.means = true;

    this.lines = this.svg.appendChild(make("svg:g", { fill: "none", "stroke-width": 1.6 }));
    this.marks = this.svg.appendChild(make("svg:g", { class: "marks" }));
    this.readout = make("div", { class: "readout", hidden: "" });
    // A range input gives the keyboard and screen readers what they know; the pointer moves it too.
    const label = say("values", { title: this.data.title, axis: this.data[this.along].label });
    this.input = make("input", { type: "range", class: "unseen", min: 0, max: 0, step: 1, value: 0, "aria-label": label });
    const holder = make("div", { class: "plot" });
    this.svg.replaceWith(holder);
    holder.append(this.svg, this.input, this.readout);

    this.input.addEventListener("input", () => this.show(Number(this.input.value)));
    this.input.addEventListener("focus", () => this.show(Number(this.input.value)));
    this.input.addEventListener("blur", () => this.leave());
    holder.addEventListener("pointermove", (event) => this.point(event));
    holder.addEventListener("pointerdown", (event) => this.point(event));
    holder.addEventListener("pointerleave", () => document.activeElement === this.input || this.leave());
    if (this.data.frames) holder.after(this.slider());
    this.update();
  }

  get series() {
    return this.frame === undefined ? this.data.series : this.data.frames.items[this.frame].series;
  }

  get shown() {
    return this.series.filter((one) => !this.hidden.has(one.arm));
  }

  slider() {
    const { label, items } = this.data.frames;
    const input = make("input", { type: "range", min: 0, max: items.length - 1, step: 1, value: this.frame });
    const output = make("output");
    const aside = make("small");
    const change = () => {
      this.frame = Number(input.value);
      const { value, note } = items[this.frame];
      input.setAttribute("aria-valuetext", [value, note].filter(Boolean).join("; "));
      output.textContent = value;
      aside.textContent = note;
      this.update();
    };
    input.addEventListener("input", change);
    change();
    return make("label", { class: "slider" }, make("span", {}, label), input, output, aside);
  }

  // Draw anew after a switch: matplotlib's lines for the first frame, lines of our own for the others and for single seeds.
  update() {
    const drawn = this.frame === this.data.frames?.first;
    for (const node of this.svg.querySelectorAll("[data-line]"))
      node.style.display = drawn && this.means && !this.hidden.has(node.dataset.line) ? "" : "none";
    for (const node of this.svg.querySelectorAll("[data-legend]"))
      node.style.opacity = this.hidden.has(node.dataset.legend) ? 0.3 : "";
    this.lines.replaceChildren();
    for (const one of this.shown) {
      if (!drawn && this.means) this.line(one, one.points, 1.6);
      for (const seed of this.seeds) if (one.seeds?.[seed]) this.line(one, one.seeds[seed], 0.9);
    }
    const stops = this.shown.flatMap((one) => one.points.map(([x, y]) => (this.along === "x" ? x : y)));
    const visible = stops.filter((stop) => !Number.isNaN(this.place[this.along](stop)));
    this.stops = [...new Set(visible)].sort((a, b) => (this.along === "x" ? a - b : b - a));
    this.input.max = Math.max(this.stops.length - 1, 0);
    this.leave();
    if (document.activeElement === this.input) this.show(Number(this.input.value));
    else this.input.setAttribute("aria-valuetext", say("key"));
  }

  line(one, points, width) {
    const places = points.map(([x, y]) => [this.place.x(x), this.place.y(y)]).filter((place) => !place.some(Number.isNaN));
    const path = make("svg:polyline", { points: places.join(" "), "stroke-width": width, "stroke-dasharray": one.dash ?? "" });
    path.style.stroke = one.color;
    this.lines.append(path);
  }

  point(event) {
    if (!this.stops.length || event.target === this.input) return;
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    const distances = this.stops.map((stop) => Math.abs(this.place[this.along](stop) - place[this.along]));
    this.input.value = distances.indexOf(Math.min(...distances));
    this.show(Number(this.input.value));
  }

  leave() {
    this.readout.hidden = true;
    this.marks.replaceChildren();
  }

  // Mark the points at a stop and tell their values.
  show(index) {
    this.leave();
    const stop = this.stops[index];
    if (stop === undefined) return;
    const { x, y } = this.data;
    const found = this.shown.map((one) => ({ one, ...this.at(one, stop) })).filter(({ told }) => told);
    const at = this.place[this.along](stop);
    const ends = this.along === "x" ? [at, y.places[0], at, y.places[1]] : [x.places[0], at, x.places[1], at];
    this.marks.append(make("svg:path", { d: `M${ends[0]} ${ends[1]}L${ends[2]} ${ends[3]}` }));
    for (const { one, points } of found)
      for (const [px, py] of points) {
        const dot = make("svg:circle", { cx: this.place.x(px), cy: this.place.y(py), r: 3.5 });
        dot.style.fill = one.color;
        if (!Number.isNaN(this.place.x(px) + this.place.y(py))) this.marks.append(dot);
      }
    const head = this.data[this.along].names?.[stop] ?? `${x.label} ${number(stop, 6)}`;
    const rows = found.map(({ one, told }) => make("div", {}, swatch(one), head === one.label ? told : `${one.label} ${told}`));
    this.readout.replaceChildren(make("strong", {}, head), ...rows);
    this.readout.hidden = false;
    this.readout.style.maxWidth = found.length > 3 ? "100%" : "";
    this.input.setAttribute("aria-valuetext", [head, ...rows.map((row) => row.textContent)].join("; "));
    // Below the marked points along y; beside them along x, in the half with more room, or below the plot if there is not enough.
    const [, , width, height] = this.svg.getAttribute("viewBox").split(" ").map(Number);
    const style = { top: "auto", bottom: "auto", left: "auto", right: "auto" };
    if (this.along === "y") Object.assign(style, { top: `${(100 * (at + 8)) / height}%`, right: "0" });
    else if (found.length > 3) Object.assign(style, { top: "100%", left: "0" });
    else {
      const [bottom, top] = y.places;
      const marked = found.flatMap(({ points }) => points);
      const high = marked.filter(([, py]) => this.place.y(py) < (bottom + top) / 2);
      if (2 * high.length > marked.length) style.bottom = `${100 - (100 * (bottom - 6)) / height}%`;
      else style.top = `${(100 * (top + 6)) / height}%`;
      if (at < width / 2) style.left = `calc(${(100 * at) / width}% + 0.7rem)`;
      else style.right = `calc(${100 - (100 * at) / width}% + 0.7rem)`;
    }
    Object.assign(this.readout.style, style);
  }

  // The points of a series at a stop, and their values in words.
  at(one, stop) {
    const here = ([x, y]) => (this.along === "x" ? x : y) === stop;
    if (this.along === "y") {
      const chosen = one.points.filter(here);
      return { points: chosen, told: chosen.map((point) => point[2]).filter(Boolean).join(", ") };
    }
    const points = this.means ? one.points.filter(here) : [];
    const told = points.map(([, y, low, high]) => number(y) + (low < high ? ` ${say("range", { low: number(low), high: number(high) })}` : ""));
    for (const seed of [...this.seeds].sort())
      for (const point of (one.seeds?.[seed] ?? []).filter(here)) {
        points.push(point);
        told.push(`${say("seed", { seed })}: ${number(point[1])}`);
      }
    return { points, told: told.join(", ") };
  }
}

function swatch({ color, dash }) {
  const line = make("svg:path", { d: "M0 5H24", "stroke-width": 2.5, "stroke-dasharray": dash ?? "" });
  line.style.stroke = color;
  return make("svg:svg", { class: "swatch", viewBox: "0 0 24 10", "aria-hidden": "true" }, line);
}

function checkbox(checked, change, ...label) {
  const input = make("input", { type: "checkbox" });
  input.checked = checked;
  input.addEventListener("change", () => change(input.checked));
  return make("label", {}, input, ...label);
}

// Switches for all plots of an experiment: its arms, the mean, and each seed.
function switches(plots) {
  const apply = (change) => plots.forEach((plot) => (change(plot), plot.update()));
  const flip = (set, key, on) => (on ? set.add(key) : set.delete(key));
  const arms = new Map(plots.flatMap((plot) => plot.series).map((one) => [one.arm, one]));
  const seeds = Math.max(0, ...plots.flatMap((plot) => plot.series).map((one) => one.seeds?.length ?? 0));
  const groups = [];
  if (arms.size > 1) {
    const boxes = [...arms].map(([arm, one]) =>
      checkbox(true, (on) => apply((plot) => flip(plot.hidden, arm, !on)), swatch(one), one.label));
    groups.push(make("fieldset", {}, make("legend", {}, say("show")), ...boxes));
  }
  if (seeds > 1) {
    const boxes = [...Array(seeds).keys()].map((seed) =>
      checkbox(false, (on) => apply((plot) => flip(plot.seeds, seed, on)), say("seed", { seed })));
    const mean = checkbox(true, (on) => apply((plot) => (plot.means = on)), say("mean"));
    groups.push(make("fieldset", {}, make("legend", {}, say("lines")), mean, ...boxes));
  }
  return groups;
}

for (const figures of document.querySelectorAll(".figures")) {
  const plots = [...figures.querySelectorAll("figure")].map((figure) => new Plot(figure));
  figures.before(make("div", { class: "switches" }, ...switches(plots)));
}
