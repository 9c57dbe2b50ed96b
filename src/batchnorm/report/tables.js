// Makes a long table answer: sorted by any column, filtered by text and by severity, shown by pages, and read row by row with the arrow
// keys. All rows lie in the page (batchnorm/diagnostics/page.py); without this script they are shown at once.

const PAGE = 100;
const RANKS = { error: 0, warning: 1, note: 2 };
const rank = (row) => RANKS[row.dataset.severity] ?? 3;
const grouped = (value) => value.toLocaleString("en-US");

// Numbers before text before nothing.
function keyed(text) {
  const value = text === "inf" ? Infinity : text.trim() === "" ? NaN : Number(text);
  return Number.isNaN(value) ? (text === "–" || text === "" ? null : text) : value;
}

function compared(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

class Pages {
  constructor(holder) {
    this.table = holder.querySelector("table");
    this.body = this.table.tBodies[0];
    this.rows = [...this.body.rows];
    this.texts = this.rows.map((row) => [row.cells[0], row.cells[1], row.lastElementChild].map((cell) => cell.textContent).join(" ").toLowerCase());
    this.shown = this.rows;
    this.page = 0;

    this.filter = make("input", { type: "search", "aria-label": "Filter by name, code or class", placeholder: "name, code or class" });
    this.severity = make("select", { "aria-label": "Show layers with" },
      ...[["3", "all layers"], ["2", "with findings"], ["1", "with warnings or errors"], ["0", "with errors"]].map(([value, label]) => make("option", { value }, label)));
    this.count = make("output", { role: "status" });
    this.back = make("button", { type: "button" }, "Previous");
    this.next = make("button", { type: "button" }, "Next");
    this.told = make("div", { class: "told", role: "status" });
    holder.before(make("div", { class: "tools" }, this.filter, this.severity, this.count, make("span", { class: "turn" }, this.back, this.next)), this.told);

    this.filter.addEventListener("input", () => this.select());
    this.severity.addEventListener("change", () => this.select());
    this.back.addEventListener("click", () => this.turn(this.page - 1));
    this.next.addEventListener("click", () => this.turn(this.page + 1));
    [...this.table.tHead.rows[0].cells].forEach((head, column) => this.sortable(head, column));
    this.body.addEventListener("keydown", (event) => this.move(event));
    this.body.addEventListener("focusin", (event) => this.tell(event.target.closest("tr")));
    this.body.addEventListener("pointerover", (event) => this.tell(event.target.closest("tr")));
    this.turn(0);
  }

  // The first click on a column of numbers brings the largest to the top, the second the smallest; rows without a value stay at the end.
  sortable(head, column) {
    if (head.className === "picture") return;
    const button = make("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const keys = new Map(this.rows.map((row) => [row, column === 1 ? (row.cells[1].textContent ? rank(row) : null) : keyed(row.cells[column].textContent)]));
      const number = column > 1 && [...keys.values()].some((key) => typeof key === "number");
      const before = head.getAttribute("aria-sort");
      const order = before ? (before === "ascending" ? "descending" : "ascending") : number ? "descending" : "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const places = new Map(this.rows.map((row, place) => [row, place]));
      const sorted = [...this.rows].sort((a, b) => {
        const [one, other] = [keys.get(a), keys.get(b)];
        const by = compared(one, other);
        return (one === null || other === null ? by : sign * by) || places.get(a) - places.get(b);
      });
      this.texts = sorted.map((row) => this.texts[places.get(row)]);
      this.rows = sorted;
      this.select();
    });
  }

  select() {
    const wanted = this.filter.value.trim().toLowerCase();
    const worst = Number(this.severity.value);
    this.shown = this.rows.filter((row, place) => rank(row) <= worst && this.texts[place].includes(wanted));
    this.turn(0);
  }

  turn(page) {
    const pages = Math.max(Math.ceil(this.shown.length / PAGE), 1);
    this.page = Math.min(Math.max(page, 0), pages - 1);
    const [first, end] = [this.page * PAGE, Math.min((this.page + 1) * PAGE, this.shown.length)];
    this.body.replaceChildren(...this.shown.slice(first, end));
    for (const row of this.body.rows) row.tabIndex = -1;
    if (this.body.rows.length) this.body.rows[0].tabIndex = 0;
    const all = this.shown.length === this.rows.length ? grouped(this.rows.length) : `${grouped(this.shown.length)} of ${grouped(this.rows.length)}`;
    this.count.value = pages > 1 ? `${grouped(first + 1)} to ${grouped(end)} of ${grouped(this.shown.length)}` : `${all} layer${this.rows.length === 1 ? "" : "s"}`;
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
    this.back.parentNode.hidden = this.rows.length <= PAGE;
    this.tell(null);
  }

  // Rows are one stop of the Tab key; within them the arrow keys move.
  move(event) {
    const rows = [...this.body.rows];
    const here = rows.indexOf(event.target);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (here < 0 || rows[to] === undefined) return;
    event.preventDefault();
    rows[here].tabIndex = -1;
    rows[to].tabIndex = 0;
    rows[to].focus();
  }

  // The values of a row's picture in words, beside a larger picture.
  tell(row) {
    this.told.replaceChildren();
    const picture = row?.querySelector("svg");
    if (!picture) return this.told.append(this.shown.length ? "Point at a row, or go there with Tab and the arrow keys, for the values of its channels." : "No layer fits.");
    const lines = picture.querySelector("title").textContent.split("; ").map((line) => make("div", {}, line));
    this.told.append(picture.cloneNode(true), make("div", {}, make("strong", {}, row.cells[0].textContent), ...lines));
  }
}

for (const holder of document.querySelectorAll(".pages")) new Pages(holder);
