// Uses the page of `batchnorm learn` in Chromium as readers do: every control of every panel, in both languages, light and dark, wide and
// narrow. Prints what it met as JSON. Usage: node learn_browser.cjs CHROMIUM PAGE DIAGNOSIS OTHER
const { readFileSync } = require("fs");
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const PATIENCE = 15000; // until a result that takes long is there

async function open(browser, path, options, met) {
  const page = await (await browser.newContext({ reducedMotion: "reduce", ...options })).newPage();
  page.on("console", (message) => met.messages.push(message.text()));
  page.on("pageerror", (error) => met.messages.push(error.message));
  page.on("request", (request) => request.url().startsWith("file:") || met.messages.push(`loads ${request.url()}`));
  await page.goto(`file://${path}`);
  await page.locator(".panel .words").last().waitFor();
  return page;
}

// Two pictures on the screen later, what was changed is drawn.
const drawn = (page) => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)))));

// Trainings that run in the page have ended.
const settled = (page) => page.waitForFunction(() => !document.querySelector('[aria-busy="true"]'), undefined, { timeout: 4 * PATIENCE });
const words = (panel) => panel.locator(".words").innerText();

async function changed(page, panel, before) {
  for (const start = Date.now(); Date.now() - start < PATIENCE; ) {
    await drawn(page);
    if ((await words(panel)) !== before) return true;
  }
  return false;
}

// How a reader moves a control to another value.
async function move(control, diagnosis) {
  const kind = await control.evaluate((node) => (node.tagName === "INPUT" ? node.type : node.tagName.toLowerCase()));
  if (kind === "file") return control.setInputFiles(diagnosis);
  if (kind === "button") return control.click();
  if (kind === "select") return control.selectOption({ index: await control.evaluate((node) => (node.selectedIndex + 1) % node.options.length) });
  if (kind === "checkbox") return control.click();
  if (kind === "radio") return control.check();
  const atEnd = await control.evaluate((node) => node.value === node.max);
  await control.focus();
  for (let press = 0; press < 3; press += 1) await control.press(atEnd ? "ArrowLeft" : "ArrowRight");
}

// Each control of a panel by itself, from the values at the start: whether the text followed.
async function touch(page, panel, diagnosis, wrong) {
  const controls = panel.locator("[data-control]");
  const still = [];
  for (let i = 0; i < (await controls.count()); i += 1) {
    const control = controls.nth(i);
    await panel.locator("[data-reset]").click();
    await drawn(page);
    if ((await control.getAttribute("type")) === "radio" && (await control.isChecked())) continue;
    if ((await control.getAttribute("type")) === "file") { // another panel may have read the same diagnosis
      await control.setInputFiles(wrong);
      await panel.locator(".problem").waitFor();
      await drawn(page);
    }
    const before = await words(panel);
    await move(control, diagnosis);
    if (!(await changed(page, panel, before))) still.push(`${await panel.getAttribute("id")}: ${await control.getAttribute("data-control")} ${(await control.getAttribute("value")) ?? ""}`);
  }
  return { still, count: await controls.count() };
}

async function accessibility(page) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run());
  return violations.filter(({ impact }) => ["serious", "critical"].includes(impact)).map(({ id, nodes }) => `${id}: ${nodes[0].html}`);
}

// Controls are moved in two of the four, which takes half of the time and has each language, width and color once.
async function look(browser, path, diagnosis, wrong, met) {
  for (const language of ["en", "zh"]) {
    for (const [colorScheme, width] of [["light", 1280], ["dark", 390]]) {
      const name = `${language} ${colorScheme} ${width}`;
      const page = await open(browser, `${path}#lang=${language}`, { colorScheme, viewport: { width, height: 900 } }, met);
      met.headings.push(await page.locator("h1").innerText());
      for (const panel of await page.locator("section.panel").all()) {
        const id = await panel.getAttribute("id");
        if ((language === "en") === (width === 1280)) {
          const { still, count } = await touch(page, panel, diagnosis, wrong);
          met.still.push(...still.map((each) => `${name}: ${each}`));
          met.controls[id] = count;
        }
        for (const kind of ["guess", "check"]) {
          const options = panel.locator(`[data-question="${kind}"]`);
          for (let i = 0; i < (await options.count()); i += 1) {
            await options.nth(i).check();
            await drawn(page);
            met.feedback.push((await panel.locator(`.${kind} .feedback`).innerText()).length);
          }
        }
      }
      met.sideways.push(await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth));
      met.violations.push(...(await accessibility(page)).map((each) => `${name}: ${each}`));
      await page.context().close();
    }
  }
}

// A page with moved controls, opened again by its address.
async function again(browser, path, met) {
  const page = await open(browser, path, { viewport: { width: 1280, height: 900 } }, met);
  const panels = await page.locator("section.panel").all();
  for (const panel of panels) {
    for (const control of await panel.locator("input[data-control][type=range], input[data-control][type=checkbox], select[data-control]").all()) await move(control);
    await panel.locator("[data-question=guess]").first().check();
  }
  await page.locator("#theme").selectOption("dark");
  await page.locator("#language").selectOption("zh");
  await page.waitForTimeout(600);
  await settled(page);
  const texts = (from) => from.locator("main").innerText();
  const address = page.url();
  const other = await open(browser, address.slice("file://".length), { viewport: { width: 1280, height: 900 } }, met);
  await drawn(other);
  await settled(other);
  met.address = { same: (await texts(page)) === (await texts(other)), dark: await other.locator("html").getAttribute("data-theme"), language: await other.locator("html").getAttribute("lang"), length: address.length };
  await other.context().close();
  await page.context().close();
}

async function files(browser, path, diagnosis, wrong, met) {
  const page = await open(browser, `${path}#modes.guess=unsure`, { viewport: { width: 1280, height: 900 } }, met);
  const panel = page.locator("#modes");
  await panel.locator("input[type=file]").setInputFiles(diagnosis);
  await panel.locator(".findings").waitFor();
  met.diagnosis = { words: await words(panel), figures: await panel.locator(".figures").innerText() };
  await panel.locator("input[type=file]").setInputFiles(wrong);
  await panel.locator(".problem").waitFor();
  met.wrong = await panel.locator(".problem").innerText();
  await page.context().close();
}

// The pointer: dragging a point, clicking a cell, and values under the pointer.
async function pointer(browser, path, met) {
  const page = await open(browser, path, { viewport: { width: 1280, height: 900 } }, met);
  const point = page.locator('#numbers [data-drag="x1"]');
  await point.scrollIntoViewIfNeeded();
  const box = await point.boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
  met.pointer.readout = await page.locator("#numbers .readout").innerText();
  await page.mouse.down();
  await page.mouse.move(box.x - 60, box.y, { steps: 4 });
  await page.mouse.up();
  await drawn(page);
  met.pointer.dragged = await page.locator("#numbers-x1").inputValue();
  await page.locator('#axes [data-set="cell=40"]').click();
  await drawn(page);
  met.pointer.cell = await page.locator("#axes-cell").inputValue();
  await page.context().close();
}

async function play(browser, path, met) {
  const page = await open(browser, path, { viewport: { width: 1280, height: 900 }, reducedMotion: "no-preference" }, met);
  const button = page.locator('#modes [data-control="play"]');
  const step = () => page.locator("#modes-step").inputValue().then(Number);
  const start = await step();
  await button.click();
  await page.waitForFunction((from) => Number(document.getElementById("modes-step").value) > from + 1, start);
  await button.click();
  await drawn(page);
  const stopped = await step();
  await page.waitForTimeout(500);
  met.play = { start, stopped, later: await step() };
  await page.context().close();
}

async function without(browser, path, met) {
  const page = await (await browser.newContext({ javaScriptEnabled: false })).newPage();
  await page.goto(`file://${path}`);
  met.without = await page.locator("body").innerText();
  await page.context().close();
}

async function print(browser, path, met) {
  const page = await open(browser, path, { viewport: { width: 800, height: 900 } }, met);
  await page.emulateMedia({ media: "print" });
  const visible = (selector) => page.locator(selector).evaluateAll((nodes) => nodes.filter((node) => node.offsetParent !== null).length);
  met.print = { sliders: await visible("input[type=range]"), values: await visible(".range output"), words: await visible(".words"), keep: await visible(".keep"), contents: await visible(".contents") };
  await page.context().close();
}

(async () => {
  const [executablePath, path, diagnosis, wrong] = process.argv.slice(2);
  const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
  const browser = await chromium.launch({ executablePath, args });
  const met = { messages: [], violations: [], sideways: [], still: [], feedback: [], headings: [], controls: {}, pointer: {} };
  await look(browser, path, diagnosis, wrong, met);
  await again(browser, path, met);
  await files(browser, path, diagnosis, wrong, met);
  await pointer(browser, path, met);
  await play(browser, path, met);
  await without(browser, path, met);
  await print(browser, path, met);
  await browser.close();
  console.log(JSON.stringify(met));
})();
