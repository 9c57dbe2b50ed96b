// Opens pages of diagnoses in Chromium as readers do, and prints what it met as JSON. Usage: node diagnosis_browser.cjs CHROMIUM PAGE...
const { open, audit, values, main } = require("./browser.cjs");

async function look(browser, path) {
  const met = { messages: [], violations: [], sideways: [], plots: [] };
  await audit(browser, path, met);
  const page = await open(browser, path, { viewport: { width: 1280, height: 900 } }, met);
  for (const plot of await page.locator(".plot").all()) met.plots.push(await values(page, plot));

  const rows = page.locator(".layers tbody tr");
  const names = () => rows.locator("th").allInnerTexts();
  const count = page.locator(".tools output");
  const told = page.locator(".told");
  met.first = { names: await names(), count: await count.innerText() };

  const head = page.locator("thead th", { hasText: "drift, nats" });
  met.sorts = [];
  for (const press of ["click", "Enter", " "]) {
    if (press === "click") await head.getByRole("button").click();
    else await head.getByRole("button").press(press);
    met.sorts.push({ order: await head.getAttribute("aria-sort"), names: await names() });
  }
  met.sorted = await page.locator("thead [aria-sort]").count();

  await page.locator(".tools input").fill(met.first.names[0].toUpperCase());
  met.filtered = { names: await names(), count: await count.innerText() };
  await page.locator(".tools input").fill("no such layer");
  met.none = { names: await names(), told: await told.innerText() };
  await page.locator(".tools input").fill("");
  await page.locator(".tools select").selectOption("0");
  met.errors = await names();
  await page.locator(".tools select").selectOption("3");

  await rows.first().hover();
  met.hover = await told.innerText();
  await page.mouse.move(1, 1);
  await page.locator(".layers thead button").last().focus();
  await page.keyboard.press("Tab");
  met.focused = { told: await told.innerText(), pictures: await told.locator("svg").count() };
  await page.keyboard.press("ArrowDown");
  met.below = await told.innerText();
  await page.keyboard.press("End");
  met.end = { told: await told.innerText(), stops: await page.locator('tbody tr[tabindex="0"]').count() };

  met.turn = await page.locator(".turn").isVisible();
  if (met.turn) {
    await page.getByRole("button", { name: "Next" }).click();
    met.next = { names: await names(), count: await count.innerText() };
  }
  await page.context().close();

  const still = await open(browser, path, { javaScriptEnabled: false }, { messages: [] });
  met.without = { text: await still.locator("main").innerText(), rows: await still.locator("tbody tr").count(), inputs: await still.locator("input").count() };
  await still.context().close();
  return met;
}

main(look);
