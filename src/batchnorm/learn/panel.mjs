// A panel on the page: its heading, the guess, figures with controls, the same in words, what is seen, the sentence to keep, and the check.

import { build } from "./controls.mjs";
import { make, paragraphs, rich } from "./dom.mjs";
import { list, number, translator } from "./format.mjs";
import { question } from "./questions.mjs";
import { defaults } from "./state.mjs";

const GAP = 28; // between two figures in a row, as in page.css
const NARROW = 560; // below this width figures are one below the other
const LEAST = 200; // what is narrower is not laid out yet

export class PanelView {
  // `page` is the frame: its state, its strings, and what panels share.
  constructor(definition, place, page) {
    Object.assign(this, { definition, page, id: definition.id });
    this.t = translator(page.strings, definition.id);
    const frame = (this.frame = translator(page.strings, "frame"));
    const context = {
      id: this.id, t: this.t, frame, controls: definition.controls, change: (values) => page.change(this, values), state: () => this.state,
      load: (file) => page.load(file), problem: () => page.problem && frame(`diagnosis.${page.problem}`), diagnosis: () => page.diagnosis,
    };
    this.controls = definition.controls.map((control) => build(control, context));
    const reset = make("button", { type: "button", class: "quiet", "data-reset": true, click: () => page.change(this, defaults(definition)) }, frame("reset"));
    this.guess = question("guess", { ...context, definition: definition.guess, answered: (option) => page.answer(this, "guess", option) });
    this.check = question("check", { ...context, definition: definition.check, answered: (option) => page.answer(this, "check", option) });
    this.figures = make("div", { class: "figures" });
    this.words = make("p", { class: "words", role: "status", "aria-live": "polite", "aria-atomic": "true" });
    this.after = make("div", { class: "after" },
      make("h3", {}, frame("see")), make("div", { class: "see" }, ...paragraphs(this.t("see"))),
      make("p", { class: "keep" }, make("span", { class: "tag" }, frame("keep")), " ", ...rich(this.t("keep"))));
    const heading = `${this.id}-heading`;
    this.element = make("section", { class: "panel", id: this.id, "aria-labelledby": heading },
      make("p", { class: "kicker" }, frame("where", { place: String(place), where: this.t("where") })),
      make("h2", { id: heading, tabindex: -1 }, this.t("title")),
      make("div", { class: "intro" }, ...paragraphs(this.t("intro"))),
      this.guess.element,
      make("div", { class: "stage" },
        make("form", { class: "controls", "aria-label": frame("controls", { title: this.t("title") }), submit: (event) => event.preventDefault() }, ...this.controls.map(({ element }) => element), reset),
        make("div", { class: "seen" }, this.figures, this.words)),
      this.after,
      this.check.element);
  }

  get state() {
    return this.page.state.values[this.id];
  }

  get tools() {
    const measured = Math.floor(this.figures.clientWidth);
    const width = measured < LEAST ? 640 : measured;
    const half = width < NARROW ? width : Math.floor((width - GAP) / 2);
    return { t: this.t, frame: this.frame, number, list, width, half, figure, diagnosis: this.page.diagnosis, panelOf: this.page.panelOf, redraw: () => this.page.redraw(this) };
  }

  // Shows the state everywhere.
  update() {
    const answers = this.page.state.answers[this.id];
    this.controls.forEach(({ show }) => show(this.state));
    this.guess.show(answers.guess);
    this.check.show(answers.check);
    this.after.classList.toggle("hidden", !answers.guess);
    this.draw();
  }

  draw() {
    const { tools, state } = this;
    this.figures.replaceChildren(...this.definition.draw(state, tools));
    const words = [this.definition.describe(state, tools)].flat().filter(Boolean).join(this.frame("between"));
    if (this.words.dataset.words !== words) this.words.replaceChildren(...rich((this.words.dataset.words = words)));
  }
}

// A figure: a caption above, and charts, tables and legends. With `half` two stand side by side where there is room.
function figure(caption, content, { half = false } = {}) {
  return make("figure", { class: half ? "half" : "full" }, make("figcaption", {}, ...rich(caption)), ...content);
}
