// The page around the panels: contents, language, light and dark, the address, and the diagnosis that a reader loads.
//
// A panel is an object in panels/ID.mjs, listed in panels/index.mjs:
//
//   id        names its file, its strings (strings/*.json), its values in the address and its anchor
//   controls  what can be moved, from controls.mjs: range, choice, toggle, button, play, diagnosisFile. Controls with a value are the state
//   draw      (state, tools) => figures, each from tools.figure(caption, [elements], { half })
//   describe  (state, tools) => the same in words and numbers, a list of sentences; it must follow every control
//   guess     { options, answer } of the question before; "unsure" may be an option
//   check     { options, answer } of the question after
//
// `state` has the controls' values by name. `tools` has t(key, values) for the panel's strings, number and list of format.mjs, width and
// half in pixels for charts (plot.mjs), figure, diagnosis (null, or { findings, layers, ... } of diagnosis.mjs; own.mjs shows it), panelOf(code)
// for findings, frame(key) for strings of the frame, and redraw(), for results that come later. Elements of figures answer to the pointer by attributes (pointer.mjs). The panel's mathematics is in modules that touch no
// document, so that tests run them under node.
//
// Strings of a panel: where (in the tutorial), title, intro, guess, guess.OPTION and guess.because, see (a line a paragraph), keep, check,
// check.OPTION and check.because, a label for each control (NAME; NAME.OPTION for a choice; NAME.stop for play), and what draw and
// describe ask for, with literal keys: t("key").

import { panelOf, readDiagnosis } from "./diagnosis.mjs";
import { make, rich } from "./dom.mjs";
import { translator } from "./format.mjs";
import { PanelView } from "./panel.mjs";
import { follow } from "./pointer.mjs";
import { decode, encode } from "./state.mjs";

const PATIENCE = 250; // milliseconds without a change until the address is written

export class Frame {
  // `data` are the strings by language, and the panels that explain findings of `diagnose`, by the code or its beginning.
  constructor(panels, { strings: tables, findings }) {
    Object.assign(this, { panels, tables, diagnosis: null, problem: "", waiting: new Set(), timer: 0 });
    this.panelOf = (code) => panelOf(code, findings);
    this.state = decode(location.hash, panels);
    this.build();
    this.jump();
    addEventListener("click", (event) => this.followLink(event));
    addEventListener("hashchange", () => this.followAddress());
    addEventListener("resize", () => this.views.forEach((view) => this.redraw(view)));
    addEventListener("beforeprint", () => this.views.forEach((view) => view.draw()));
  }

  get language() {
    return this.state.language || document.documentElement.dataset.language;
  }

  get strings() {
    return this.tables[this.language];
  }

  // Everything in the chosen language.
  build() {
    const frame = translator(this.strings, "frame");
    document.documentElement.lang = frame("lang");
    document.title = frame("title");
    this.views = this.panels.map((panel, i) => new PanelView(panel, i + 1, this));
    this.contents = make("ol", {}, ...this.views.map((view) => this.entry(view)));
    document.body.replaceChildren(
      make("a", { class: "skip", href: `#panel=${this.panels[0].id}` }, frame("skip")),
      make("header", { class: "top" },
        make("div", { class: "settings" }, this.setting("language", ["en", "zh"], this.language), this.setting("theme", ["", "light", "dark"], this.state.theme)),
        make("p", { class: "kicker" }, frame("kicker")), make("h1", {}, frame("title")), make("p", { class: "lead" }, ...rich(frame("lead"))), make("p", { class: "how" }, ...rich(frame("how")))),
      make("nav", { class: "contents", "aria-label": frame("contents") }, this.contents),
      make("main", {}, ...this.views.map((view) => view.element)),
      make("footer", {}, make("p", {}, ...rich(frame("footer")))));
    for (const view of this.views) follow(view, (values) => this.change(view, values));
    this.theme();
    this.views.forEach((view) => view.update());
    this.watch();
  }

  entry(view) {
    const link = make("a", { href: `#panel=${view.id}`, "data-panel": view.id },
      make("span", { class: "number" }, String(this.views.indexOf(view) + 1)), make("span", { class: "name" }, view.t("title")));
    return make("li", {}, link);
  }

  setting(name, options, value) {
    const frame = translator(this.strings, "frame");
    const choose = () => {
      this.state[name] = select.value;
      this[name === "language" ? "build" : "theme"]();
      this.write();
      document.getElementById(name)?.focus();
    };
    const select = make("select", { id: name, change: choose }, ...options.map((option) => make("option", { value: option, selected: option === value }, frame(`${name}.${option || "system"}`))));
    return make("label", {}, make("span", {}, frame(name)), select);
  }

  theme() {
    document.documentElement.dataset.theme = this.state.theme;
  }

  // Called by panels.
  change(view, values) {
    Object.assign(this.state.values[view.id], values);
    this.touched(view);
  }

  answer(view, kind, option) {
    this.state.answers[view.id][kind] = option;
    this.touched(view);
  }

  touched(view) {
    this.state.panel = view.id;
    this.redraw(view);
    this.write();
  }

  async load(file) {
    const { diagnosis = null, problem = "" } = readDiagnosis(await file.text());
    Object.assign(this, { diagnosis, problem });
    this.views.forEach((view) => this.redraw(view));
  }

  // Once per picture on the screen, however often it is asked for.
  redraw(view) {
    if (this.waiting.size === 0) requestAnimationFrame(() => {
      const views = [...this.waiting];
      this.waiting.clear();
      views.forEach((each) => each.update());
    });
    this.waiting.add(view);
  }

  write() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => history.replaceState(null, "", `#${encode(this.state, this.panels)}`), PATIENCE);
  }

  // Links to panels leave the values as they are.
  followLink(event) {
    const id = event.target.closest?.("a[href^='#panel=']")?.hash.slice("#panel=".length);
    if (!id) return;
    event.preventDefault();
    this.state.panel = id;
    this.write();
    this.jump();
  }

  jump() {
    const view = this.views.find(({ id }) => id === this.state.panel);
    view?.element.scrollIntoView();
    view?.element.querySelector("h2").focus({ preventScroll: true });
  }

  followAddress() {
    this.state = decode(location.hash, this.panels);
    this.build();
    this.jump();
  }

  // Marks the panel that is read in the contents.
  watch() {
    this.observer?.disconnect();
    this.observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) this.contents.querySelectorAll("a").forEach((link) => (link.dataset.panel === target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
      }
    }, { rootMargin: "-30% 0px -60% 0px" });
    this.views.forEach(({ element }) => this.observer.observe(element));
  }
}
