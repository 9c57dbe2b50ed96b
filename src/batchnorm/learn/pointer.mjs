// What figures do at the pointer, by attributes of their elements: data-value shows a text, data-set="name=value" sets a control when
// clicked, data-drag="name" moves a slider along the chart's x axis. All of it can be done with the controls too.

import { make } from "./dom.mjs";

export function follow(view, change) {
  const { figures } = view;
  const readout = make("div", { class: "readout", hidden: true, "aria-hidden": "true" });
  view.element.append(readout);
  let dragged = "";

  const show = (event) => {
    const target = event.target.closest?.("[data-value]");
    readout.hidden = !target || Boolean(dragged);
    if (readout.hidden) return;
    readout.textContent = target.dataset.value;
    const box = view.element.getBoundingClientRect();
    const left = event.clientX - box.left;
    readout.style.top = `${event.clientY - box.top + 18}px`;
    readout.style.left = `${Math.max(0, Math.min(left + 14, box.width - readout.offsetWidth))}px`;
  };
  const drag = (event, svg) => {
    const { low, high, from, to } = svg.dataset;
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - from) / (to - from);
    const control = view.definition.controls.find(({ name }) => name === dragged);
    const value = Number(low) + share * (high - low);
    const stepped = Math.round(value / control.step) * control.step;
    change({ [dragged]: Number(Math.min(Math.max(stepped, control.min), control.max).toPrecision(12)) });
  };

  figures.addEventListener("pointerdown", (event) => {
    dragged = event.target.closest?.("[data-drag]")?.dataset.drag ?? "";
    if (!dragged) return;
    event.preventDefault();
    figures.setPointerCapture(event.pointerId);
    figures.dataset.chart = [...figures.querySelectorAll("svg")].indexOf(event.target.closest("svg"));
  });
  figures.addEventListener("pointermove", (event) => (dragged ? drag(event, figures.querySelectorAll("svg")[figures.dataset.chart]) : show(event)));
  for (const end of ["pointerup", "pointercancel"]) figures.addEventListener(end, () => (dragged = ""));
  figures.addEventListener("pointerleave", () => (readout.hidden = true));
  figures.addEventListener("click", (event) => {
    const [name, value] = event.target.closest?.("[data-set]")?.dataset.set.split("=") ?? [];
    if (name) change({ [name]: Number.isNaN(Number(value)) ? value : Number(value) });
  });
}
