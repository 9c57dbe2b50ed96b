// What the browser tests of pages share: opening a page, its accessibility, and the values of its plots.
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

// Serious violations, and by how much the page is too wide, and what `also` looks for: light on a desk, dark on a phone.
async function audit(browser, path, met, also = async () => {}) {
  for (const [colorScheme, width] of [["light", 1280], ["dark", 390]]) {
    const page = await open(browser, path, { colorScheme, viewport: { width, height: 900 } }, met);
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => window.axe.run());
    const grave = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
    met.violations.push(...grave.map(({ id, nodes }) => `${id} (${colorScheme}, ${width}): ${nodes[0].html}`));
    met.sideways.push(await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth));
    await also(page);
    await page.context().close();
  }
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

// Runs `look(browser, path)` on each page of the command line, and prints what it met as JSON.
async function main(look) {
  const [executablePath, ...paths] = process.argv.slice(2);
  const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
  const browser = await chromium.launch({ executablePath, args });
  const met = [];
  for (const path of paths) met.push(await look(browser, path));
  await browser.close();
  console.log(JSON.stringify(met));
}

module.exports = { open, audit, values, main };
