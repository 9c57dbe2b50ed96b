// A question with options. Once one is chosen, it says whether that was right, and why.

import { make, rich } from "./dom.mjs";

// `kind` is guess or check; `answered(option)` is called on each choice. "unsure" may be an option: then the answer is told without judging.
export function question(kind, { id, t, frame, definition, answered }) {
  const inputs = definition.options.map((option) =>
    make("input", { type: "radio", name: `${id}-${kind}`, value: option, "data-question": kind, change: () => answered(option) }));
  const labels = inputs.map((input) => make("label", {}, input, make("span", {}, ...rich(input.value === "unsure" ? frame("unsure") : t(`${kind}.${input.value}`)))));
  const feedback = make("div", { class: "feedback", role: "status" });
  const legend = make("legend", {}, make("span", { class: "tag" }, frame(kind)), " ", ...rich(t(kind)));
  const element = make("fieldset", { class: `question ${kind}` }, legend, make("div", { class: "options" }, ...labels), feedback);
  const show = (answer) => {
    inputs.forEach((input) => (input.checked = input.value === answer));
    const verdict = answer === definition.answer ? "right" : answer === "unsure" ? "told" : "wrong";
    feedback.className = `feedback ${answer && verdict}`;
    feedback.replaceChildren(...(answer ? [make("p", {}, make("strong", {}, frame(`answer.${verdict}`)), " ", ...rich(t(`${kind}.because`)))] : []));
  };
  return { element, show };
}
