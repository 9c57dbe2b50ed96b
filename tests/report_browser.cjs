// Opens pages of reports in Chromium as readers do, and prints what it met as JSON. Usage: node report_browser.cjs CHROMIUM PAGE...
const { open, audit, values, main } = require("./browser.cjs");

// Texts of pictures that stand out of them, by more than rounding.
function cut() {
  const outside = (text) => {
    const [inner, outer] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
    return inner.left < outer.left - 2 || inner.right > outer.right + 2;
  };
  return [...document.querySelectorAll("figure svg text")].filter(outside).map((text) => text.textContent);
}

// Tables that are wider than their place, and scroll in it.
function wide() {
  return [...document.querySelectorAll(".scroll, table")].filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.innerText);
}

async function look(browser, path) {
  const met = { messages: [], violations: [], sideways: [], cut: [], wide: [], plots: [], without: {} };
  await audit(browser, path, met, async (page) => {
    met.cut.push(...(await page.evaluate(cut)));
    met.wide.push(...(await page.evaluate(wide)));
  });

  const page = await open(browser, path, { viewport: { width: 1280, height: 900 } }, met);
  for (const plot of await page.locator(".plot").all()) met.plots.push(await values(page, plot));

  const switches = page.locator(".switches").first();
  const figures = page.locator(".figures").first();
  const displayed = (selector) => figures.locator(selector).evaluateAll((nodes) => nodes.filter((node) => getComputedStyle(node).display !== "none").length);
  const [arm, seed] = [switches.locator("fieldset").first().locator("input").first(), switches.getByLabel(/^(seed|种子) 0$/)];
  const lines = '[data-line="plain"]';
  met.arm = { label: await switches.locator("label").first().innerText(), before: await displayed(lines) };
  await arm.uncheck();
  met.arm.after = await displayed(lines);
  met.arm.values = await values(page, figures.locator(".plot").first());
  await arm.check();
  met.arm.again = await displayed(lines);
  await seed.check();
  met.seed = { drawn: await displayed("polyline"), values: await values(page, figures.locator(".plot").first()) };
  await seed.uncheck();
  const slider = page.locator(".slider input").first();
  await slider.focus();
  await page.keyboard.press("End");
  met.slider = { value: await page.locator(".slider output").first().innerText(), drawn: await displayed("polyline"), lines: await figures.locator(".plot").first().locator("[data-line]").evaluateAll((nodes) => nodes.filter((node) => node.style.display !== "none").length) };
  await page.context().close();

  const still = await open(browser, path, { javaScriptEnabled: false }, { messages: [] });
  met.without = { text: await still.locator("main").innerText(), inputs: await still.locator("input").count(), pictures: await still.locator("figure svg").count() };
  await still.context().close();
  return met;
}

main(look);
