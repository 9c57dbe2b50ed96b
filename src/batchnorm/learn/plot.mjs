// Charts as SVG in the page's colors. Sizes are pixels of the page, so that text is readable at every width.

import { make } from "./dom.mjs";
import { number } from "./format.mjs";

export const COLORS = {
  ink: "var(--ink)", muted: "var(--muted)", grid: "var(--grid)", plain: "var(--plain)", batchNorm: "var(--batch-norm)", green: "var(--series-3)",
  purple: "var(--series-4)", red: "var(--series-5)", olive: "var(--series-6)", teal: "var(--series-7)",
};

const MARGIN = { top: 14, right: 14, bottom: 40, left: 46 };

export function ticks(low, high, most = 6) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

export function logTicks(low, high, most = 6) {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const every = Math.max(1, Math.ceil((last - first) / most));
  return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, i) => 10 ** (first + i * every));
}

// A chart with axes. `x` and `y` are { domain: [low, high], label, log, ticks }; a `y` without a label has no axis. Its methods draw and
// return the chart; `chart.x(value)` and `chart.y(value)` are places in pixels.
export class Chart {
  constructor({ width, height = 240, label, x, y, margin = {} }) {
    const room = { ...MARGIN, ...(y.label ? {} : { left: 14 }), ...margin };
    Object.assign(this, { width, height, left: room.left, right: width - room.right, top: room.top, bottom: height - room.bottom });
    this.x = scale(x, this.left, this.right);
    this.y = scale(y, this.bottom, this.top);
    this.svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    this.clip = `clip-${(Chart.count = (Chart.count ?? 0) + 1)}`;
    this.svg.append(make("svg:clipPath", { id: this.clip }, make("svg:rect", { x: this.left - 1, y: this.top - 8, width: this.right - this.left + 2, height: this.bottom - this.top + 9 })));
    // For controls that are dragged along the x axis.
    Object.assign(this.svg.dataset, { low: x.domain[0], high: x.domain[1], from: this.left / width, to: this.right / width });
    this.axisX(x);
    if (y.label) this.axisY(y);
  }

  axisX({ domain: [low, high], label, log, ticks: chosen }) {
    const most = Math.max(2, Math.floor((this.right - this.left) / 62));
    for (const value of chosen ?? (log ? logTicks : ticks)(low, high, most)) {
      this.svg.append(
        make("svg:line", { x1: this.x(value), x2: this.x(value), y1: this.bottom, y2: this.bottom + 4, stroke: COLORS.grid }),
        make("svg:text", { x: this.x(value), y: this.bottom + 17, "text-anchor": "middle", class: "tick" }, number(value, 4, log ? 0 : undefined)));
    }
    this.svg.append(
      make("svg:line", { x1: this.left, x2: this.right, y1: this.bottom, y2: this.bottom, stroke: COLORS.muted, "stroke-width": 0.8 }),
      make("svg:text", { x: (this.left + this.right) / 2, y: this.height - 5, "text-anchor": "middle", class: "axis" }, label));
  }

  axisY({ domain: [low, high], label, log, ticks: chosen }) {
    for (const value of chosen ?? (log ? logTicks : ticks)(low, high, Math.max(2, Math.floor((this.bottom - this.top) / 38)))) {
      this.svg.append(
        make("svg:line", { x1: this.left, x2: this.right, y1: this.y(value), y2: this.y(value), stroke: COLORS.grid, "stroke-width": 0.6 }),
        make("svg:text", { x: this.left - 7, y: this.y(value) + 4, "text-anchor": "end", class: "tick" }, number(value, 4, log ? 0 : undefined)));
    }
    const middle = (this.top + this.bottom) / 2;
    this.svg.append(make("svg:text", { x: 11, y: middle, "text-anchor": "middle", class: "axis", transform: `rotate(-90 11 ${middle})` }, label));
  }

  add(...elements) {
    this.svg.append(...elements);
    return this;
  }

  clipped(element) {
    element.setAttribute("clip-path", `url(#${this.clip})`);
    return this.add(element);
  }

  // Through points [x, y]; points that are not finite interrupt it.
  line(points, { color = COLORS.ink, width = 1.8, dash } = {}) {
    let pen = "M";
    const path = points.map(([x, y]) => {
      const [at, up] = [this.x(x), this.y(y)];
      if (!Number.isFinite(at) || !Number.isFinite(up)) { pen = "M"; return ""; }
      const piece = `${pen}${at.toFixed(1)} ${up.toFixed(1)}`;
      pen = "L";
      return piece;
    });
    return this.clipped(make("svg:path", { d: path.join(""), fill: "none", stroke: color, "stroke-width": width, "stroke-dasharray": dash, "stroke-linejoin": "round" }));
  }

  dots(points, { color = COLORS.ink, radius = 4, opacity } = {}) {
    for (const [x, y, value] of points) this.add(make("svg:circle", { cx: this.x(x), cy: this.y(y), r: radius, fill: color, opacity, "data-value": value }));
    return this;
  }

  // Bars from zero; each is [from, to, height, value shown at the pointer].
  bars(bars, { color = COLORS.batchNorm, opacity = 0.75 } = {}) {
    for (const [from, to, height, value] of bars) {
      const [a, b] = [this.y(0), this.y(height)];
      this.clipped(make("svg:rect", { x: this.x(from) + 0.5, width: Math.max(this.x(to) - this.x(from) - 1, 1), y: Math.min(a, b), height: Math.abs(b - a), fill: color, opacity, "data-value": value }));
    }
    return this;
  }

  // A line across the chart at a value of an axis, with a short text.
  rule(axis, value, { color = COLORS.muted, dash = "3 3", text = "", anchor = "start" } = {}) {
    const at = this[axis](value);
    const ends = axis === "x" ? { x1: at, x2: at, y1: this.top, y2: this.bottom } : { x1: this.left, x2: this.right, y1: at, y2: at };
    this.clipped(make("svg:line", { ...ends, stroke: color, "stroke-dasharray": dash, "stroke-width": 1.2 }));
    const shift = anchor === "start" ? 4 : -4;
    if (text) this.text(axis === "x" ? at + shift : this.right, axis === "x" ? this.top + 6 : at - 5, text, { color, anchor: axis === "x" ? anchor : "end" });
    return this;
  }

  // A text at a place in pixels.
  text(x, y, content, { color = COLORS.muted, anchor = "start" } = {}) {
    return this.add(make("svg:text", { x, y, fill: color, "text-anchor": anchor, class: "note" }, content));
  }

  // What the pointer shows at each of the values along x.
  values(along, text) {
    const places = along.map((value) => this.x(value));
    along.forEach((value, i) => {
      const from = i === 0 ? this.left : (places[i - 1] + places[i]) / 2;
      const to = i === along.length - 1 ? this.right : (places[i] + places[i + 1]) / 2;
      this.add(make("svg:rect", { x: from, y: this.top, width: Math.max(to - from, 0), height: this.bottom - this.top, fill: "transparent", "data-value": text(value, i), "data-at": places[i] / this.width }));
    });
    return this;
  }
}

function scale({ domain: [low, high], log }, start, end) {
  const along = log ? Math.log10 : Number;
  return (value) => start + ((along(value) - along(low)) / (along(high) - along(low))) * (end - start);
}

// Names of colors, [color, name, dash], for above a chart.
export function legend(items) {
  const swatch = (color, dash) =>
    make("svg:svg", { class: "swatch", viewBox: "0 0 24 10", "aria-hidden": "true" }, make("svg:line", { x1: 0, x2: 24, y1: 5, y2: 5, stroke: color, "stroke-width": 3, "stroke-dasharray": dash }));
  return make("p", { class: "legend" }, ...items.map(([color, name, dash]) => make("span", {}, swatch(color, dash), name)));
}
