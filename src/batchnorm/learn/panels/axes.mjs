// Which axes: the cells of a tensor (N, C, H, W) that share one mean and variance, for four normalizations.

import { choice, range } from "../controls.mjs";
import { make } from "../dom.mjs";
import { mean, variance } from "../mathematics.mjs";
import { COLORS } from "../plot.mjs";
import { normal, several } from "../random.mjs";
import { table } from "../table.mjs";

const KINDS = ["batch", "layer", "instance", "group"];
const MOST = { N: 4, C: 6, H: 4, W: 4 };
const CELLS = MOST.N * MOST.C * MOST.H * MOST.W;
const NUMBERS = several(CELLS, normal(5));

export const axes = {
  id: "axes",
  controls: [
    choice("kind", KINDS),
    ...[["N", 3], ["C", 4], ["H", 3], ["W", 3]].map(([name, value]) => range(name, { min: 1, max: MOST[name], value })),
    range("groups", { min: 1, max: MOST.C, value: 2 }),
    range("cell", { min: 0, max: CELLS - 1, value: 0 }),
  ],
  guess: { options: ["one", "sample", "channel", "unsure"], answer: "channel" },
  check: { options: ["batch", "layer", "group"], answer: "batch" },

  draw(state, tools) {
    return [tools.figure(tools.t("cells"), [cells(state, tools)]), tools.figure(tools.t("sizes"), [comparison(state, tools)])];
  },

  describe(state, { t }) {
    const set = shared(state);
    const { n, c, h, w } = chosen(state);
    return [
      t("words.shape", { N: String(state.N), C: String(state.C), H: String(state.H), W: String(state.W) }),
      t("words.cell", { cell: t("cell.name", { n: String(n + 1), c: String(c + 1), h: String(h + 1), w: String(w + 1) }), kind: t(`kind.${state.kind}`), size: String(set.length), axes: over(state, t) }),
      set.length === 1 ? t("words.single") : t("words.statistics", { mean: mean(set), variance: variance(set) }),
      t("words.counts", { sets: String(sets(state)), gamma: gammaSize(state) }),
      t("words.groups", { groups: String(groupCount(state)), each: String(state.C / groupCount(state)) }),
    ];
  },
};

// The largest number of groups up to the chosen one that divides the channels.
export function groupCount({ C, groups }) {
  let count = Math.min(groups, C);
  while (C % count) count -= 1;
  return count;
}

function chosen({ N, C, H, W, cell }) {
  const index = cell % (N * C * H * W);
  return { n: Math.floor(index / (C * H * W)), c: Math.floor(index / (H * W)) % C, h: Math.floor(index / W) % H, w: index % W };
}

const group = (state, c) => Math.floor(c / (state.C / groupCount(state)));

// Whether two cells share their statistics.
export function together(state, a, b) {
  switch (state.kind) {
    case "batch": return a.c === b.c;
    case "layer": return a.n === b.n;
    case "instance": return a.n === b.n && a.c === b.c;
    default: return a.n === b.n && group(state, a.c) === group(state, b.c);
  }
}

function every({ N, C, H, W }) {
  return several(N * C * H * W, (_, i) => i).map((_, index) => ({ index, ...chosen({ N, C, H, W, cell: index }) }));
}

const value = ({ n, c, h, w }) => NUMBERS[((n * MOST.C + c) * MOST.H + h) * MOST.W + w];
const shared = (state) => every(state).filter((cell) => together(state, cell, chosen(state))).map(value);

// How many pairs of mean and variance there are.
export function sets({ kind, N, C, ...state }) {
  return { batch: C, layer: N, instance: N * C, group: N * groupCount({ C, ...state }) }[kind];
}

const gammaSize = ({ kind, C, H, W }) => (kind === "layer" ? `${C} × ${H} × ${W}` : String(C));
const over = ({ kind }, t) => t(`over.${kind}`);

// A plane of H × W cells for each sample (down) and channel (across).
function cells(state, { t, width }) {
  const left = Math.min(86, width * 0.2);
  const size = Math.min(26, (width - left - 8 * state.C) / (state.C * state.W));
  const [across, down] = [state.W * size + 10, state.H * size + 12];
  const height = 26 + state.N * down;
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": t("cells") });
  const mine = chosen(state);
  for (let c = 0; c < state.C; c += 1) svg.append(make("svg:text", { x: left + c * across + (state.W * size) / 2, y: 13, class: "tick", "text-anchor": "middle" }, state.C * 78 < width ? t("channel", { c: String(c + 1) }) : String(c + 1)));
  for (let n = 0; n < state.N; n += 1) svg.append(make("svg:text", { x: left - 12, y: 28 + n * down + (state.H * size) / 2, class: "tick", "text-anchor": "end" }, t("sample", { n: String(n + 1) })));
  for (const cell of every(state)) {
    const { n, c, h, w, index } = cell;
    const same = together(state, cell, mine);
    const own = n === mine.n && c === mine.c && h === mine.h && w === mine.w;
    svg.append(make("svg:rect", {
      x: left + c * across + w * size, y: 24 + n * down + h * size, width: size - 2, height: size - 2, rx: 2,
      fill: own ? COLORS.plain : same ? COLORS.batchNorm : "var(--grid)", "data-set": `cell=${index}`, "data-value": t("cell.name", { n: String(n + 1), c: String(c + 1), h: String(h + 1), w: String(w + 1) }),
    }));
  }
  return svg;
}

function comparison(state, { t }) {
  const rows = KINDS.map((kind) => {
    const each = { ...state, kind };
    const size = shared(each).length;
    return [t(`kind.${kind}`) + (kind === state.kind ? " ●" : ""), over(each, t), String(size), String(sets(each)), gammaSize(each), t(kind === "batch" ? "yes" : "no")];
  });
  return table(t("sizes"), [t("column.kind"), t("column.over"), t("column.values"), t("column.sets"), t("column.gamma"), t("column.batch")], rows);
}
