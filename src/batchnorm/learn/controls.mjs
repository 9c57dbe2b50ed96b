// What a reader can move. The first half declares controls, for panels; the second makes real inputs of them.

import { make, rich } from "./dom.mjs";
import { number } from "./format.mjs";

// A slider. With `log` it moves through powers of ten, and `step` is of the exponent.
export const range = (name, { min, max, step = 1, value, log = false }) => ({ kind: "range", name, min, max, step, value, log });

// One of several options, which are words.
export const choice = (name, options, value = options[0]) => ({ kind: "choice", name, options, value });

export const toggle = (name, value = false) => ({ kind: "toggle", name, value });

// A button; `change` gets the panel's state and returns the values that it sets.
export const button = (name, change) => ({ kind: "button", name, change });

// A button that moves the slider `target` on by `by` every `every` milliseconds to its end, at once for those who want no motion.
export const play = (name, target, { every = 400, by = 1 } = {}) => ({ kind: "play", name, target, every, by });

// Reads the JSON of `batchnorm diagnose`; all panels get it as `tools.diagnosis`.
export const diagnosisFile = () => ({ kind: "diagnosis", name: "diagnosis" });

const MOST_RADIOS = 4;

// The element of a control and a function that shows a state in it. `panel` is { id, t, change(values), load(file), state() }.
export function build(control, panel) {
  return BUILDERS[control.kind](control, panel);
}

const BUILDERS = { range: buildRange, choice: buildChoice, toggle: buildToggle, button: buildButton, play: buildPlay, diagnosis: buildFile };

function buildRange(control, { id, t, change }) {
  const name = `${id}-${control.name}`;
  const place = control.log ? Math.log10 : Number;
  const value = control.log ? (at) => Number((10 ** at).toPrecision(3)) : Number;
  const input = make("input", {
    type: "range", id: name, min: place(control.min), max: place(control.max), step: control.step, "data-control": control.name,
    input: () => change({ [control.name]: Math.min(Math.max(value(Number(input.value)), control.min), control.max) }),
  });
  const output = make("output", { for: name });
  const element = make("div", { class: "range" }, make("label", { for: name }, t(control.name)), output, input);
  const show = (state) => {
    const text = number(state[control.name], 4);
    input.value = place(state[control.name]);
    input.setAttribute("aria-valuetext", text);
    output.textContent = text;
  };
  return { element, show };
}

function buildChoice(control, panel) {
  return control.options.length > MOST_RADIOS ? buildSelect(control, panel) : buildRadios(control, panel);
}

function buildSelect(control, { id, t, change }) {
  const name = `${id}-${control.name}`;
  const options = control.options.map((option) => make("option", { value: option }, t(`${control.name}.${option}`)));
  const select = make("select", { id: name, "data-control": control.name, change: () => change({ [control.name]: select.value }) }, ...options);
  const element = make("div", { class: "select" }, make("label", { for: name }, t(control.name)), select);
  return { element, show: (state) => (select.value = state[control.name]) };
}

function buildRadios(control, { id, t, change }) {
  const inputs = control.options.map((option) =>
    make("input", { type: "radio", name: `${id}-${control.name}`, value: option, "data-control": control.name, change: () => change({ [control.name]: option }) }));
  const labels = inputs.map((input) => make("label", {}, input, make("span", {}, t(`${control.name}.${input.value}`))));
  const element = make("fieldset", { class: "radios" }, make("legend", {}, t(control.name)), make("div", {}, ...labels));
  return { element, show: (state) => inputs.forEach((input) => (input.checked = input.value === state[control.name])) };
}

function buildToggle(control, { t, change }) {
  const input = make("input", { type: "checkbox", "data-control": control.name, change: () => change({ [control.name]: input.checked }) });
  const element = make("label", { class: "toggle" }, input, make("span", {}, ...rich(t(control.name))));
  return { element, show: (state) => (input.checked = state[control.name]) };
}

function buildButton(control, { t, change, state }) {
  const press = () => change(control.change(state()));
  return { element: make("button", { type: "button", "data-control": control.name, click: press }, t(control.name)), show: () => {} };
}

function buildPlay(control, { t, change, state, controls }) {
  const target = controls.find(({ name }) => name === control.target);
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; element.textContent = t(control.name); };
  const advance = () => {
    const next = Math.min(state()[control.target] + control.by, target.max);
    change({ [control.target]: next });
    if (next === target.max || !element.isConnected) stop();
  };
  const start = () => {
    if (state()[control.target] === target.max) change({ [control.target]: target.min });
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return change({ [control.target]: target.max });
    element.textContent = t(`${control.name}.stop`);
    timer = setInterval(advance, control.every);
    return advance();
  };
  const element = make("button", { type: "button", "data-control": control.name, click: () => (timer ? stop() : start()) }, t(control.name));
  return { element, show: () => {} };
}

function buildFile(control, { id, frame, load, problem, diagnosis }) {
  const name = `${id}-${control.name}`;
  const input = make("input", { type: "file", id: name, accept: ".json,application/json", "data-control": control.name, change: () => input.files[0] && load(input.files[0]) });
  const note = make("p", { class: "file-note", role: "status" });
  const element = make("div", { class: "file" }, make("label", { for: name }, frame("diagnosis")), input, note);
  const show = () => {
    note.replaceChildren(...rich(problem() || (diagnosis() ? frame("diagnosis.loaded", { layers: Object.keys(diagnosis().layers).length, findings: diagnosis().findings.length }) : frame("diagnosis.how"))));
    note.classList.toggle("problem", Boolean(problem()));
  };
  return { element, show };
}
