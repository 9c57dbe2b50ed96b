// The values of all controls as the fragment of the page's address, so that a link shows the same. Only what differs from its default is
// written: #panel=modes&lang=zh&modes.momentum=0.3. The name of a panel alone leads to it too: #modes

const LANGUAGES = ["en", "zh"];
const THEMES = ["light", "dark"];
const QUESTIONS = ["guess", "check"];

export const holdsValue = (control) => "value" in control;

export function defaults(panel) {
  return Object.fromEntries(panel.controls.filter(holdsValue).map((control) => [control.name, control.value]));
}

// The page as it opens: no panel asked for, and the language and theme of the reader.
export function initial(panels) {
  return {
    panel: "",
    language: "",
    theme: "",
    values: Object.fromEntries(panels.map((panel) => [panel.id, defaults(panel)])),
    answers: Object.fromEntries(panels.map((panel) => [panel.id, { guess: "", check: "" }])),
  };
}

export function encode(page, panels) {
  const pairs = [["panel", page.panel], ["lang", page.language], ["theme", page.theme]].filter(([, value]) => value);
  for (const panel of panels) {
    for (const control of panel.controls.filter(holdsValue)) {
      const value = page.values[panel.id][control.name];
      if (value !== control.value) pairs.push([`${panel.id}.${control.name}`, written(value)]);
    }
    for (const question of QUESTIONS) {
      const answer = page.answers[panel.id][question];
      if (answer) pairs.push([`${panel.id}.${question}`, answer]);
    }
  }
  return new URLSearchParams(pairs).toString();
}

// What is unknown or out of range is ignored: links may be old or mistyped.
export function decode(fragment, panels) {
  const page = initial(panels);
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  page.panel = panels.find(({ id }) => id === given.get("panel") || given.has(id))?.id ?? "";
  if (LANGUAGES.includes(given.get("lang"))) page.language = given.get("lang");
  if (THEMES.includes(given.get("theme"))) page.theme = given.get("theme");
  for (const panel of panels) {
    for (const control of panel.controls.filter(holdsValue)) {
      const text = given.get(`${panel.id}.${control.name}`);
      const value = text === null ? undefined : read(text, control);
      if (value !== undefined) page.values[panel.id][control.name] = value;
    }
    for (const question of QUESTIONS) {
      const answer = given.get(`${panel.id}.${question}`);
      if (panel[question].options.includes(answer)) page.answers[panel.id][question] = answer;
    }
  }
  return page;
}

function written(value) {
  if (typeof value === "boolean") return value ? "1" : "0";
  return typeof value === "number" ? String(Number(value.toPrecision(12))) : value;
}

function read(text, control) {
  if (control.kind === "toggle") return text === "1" ? true : text === "0" ? false : undefined;
  if (control.kind === "choice") return control.options.includes(text) ? text : undefined;
  const value = Number(text);
  return text !== "" && Number.isFinite(value) ? Math.min(Math.max(value, control.min), control.max) : undefined;
}
