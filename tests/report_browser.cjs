// Opens pages of reports in Chromium as readers do, and prints what it met as JSON. Usage: node report_browser.cjs CHROMIUM PAGE...
const { readFileSync } = require("fs");
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

async function open(browser, path, options, met) {
  const page = await (await browser.newContext(options)).newPage();
  page.on("console", (message) => met.messages.push(message.text()));
  page.on("pageerror", (error) => met.messages.push(error.message));
  page.on("request", (request) => request.url().startsWith("file:") || met.messages.push(`loads ${request.url()}`));
  await page.goto(`file://${path}`);
  return page;
}

const readout = (plot) => plot.locator(".readout").evaluate((node) => (node.hidden ? "" : node.innerText));

// The readouts of a plot: under the pointer, after the pointer left, and at the first points by keyboard.
async function values(page, plot) {
  await plot.scrollIntoViewIfNeeded();
  const box = await plot.boundingBox();
  await page.mouse.move(box.x + 0.6 * box.width, box.y + 0.5 * box.height);
  const hover = await readout(plot);
  await page.mouse.move(1, 1);
  const left = await readout(plot);
  const input = plot.locator("input");
  await input.focus();
  await page.keyboard.press("Home");
  const first = await readout(plot);
  await page.keyboard.press("ArrowRight");
  const keyboard = { text: await readout(plot), announced: await input.getAttribute("aria-valuetext"), marks: await plot.locator(".marks circle").count() };
  await input.blur();
  return { hover, left, first, ...keyboard };
}

// Texts of pictures that stand out of them, by more than rounding.
function cut() {
  const outside = (text) => {
    const [inner, outer] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
    return inner.left < outer.left - 2 || inner.right > outer.right + 2;
  };
  return [...document.querySelectorAll("figure svg text")].filter(outside).map((text) => text.textContent);
}

async function look(browser, path) {
  const met = { messages: [], violations: [], sideways: [], cut: [], plots: [], without: {} };
  for (const [colorScheme, width] of [["light", 1280], ["dark", 390]]) {
    const page = await open(browser, path, { colorScheme, viewport: { width, height: 900 } }, met);
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => window.axe.run());
    const grave = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
    met.violations.push(...grave.map(({ id, nodes }) => `${id} (${colorScheme}, ${width}): ${nodes[0].html}`));
    met.sideways.push(await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth));
    met.cut.push(...(await page.evaluate(cut)));
    await page.context().close();
  }

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

(async () => {
  const [executablePath, ...paths] = process.argv.slice(2);
  const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
  const browser = await chromium.launch({ executablePath, args });
  const met = [];
  for (const path of paths) met.push(await look(browser, path));
  await browser.close();
  console.log(JSON.stringify(met));
})();
