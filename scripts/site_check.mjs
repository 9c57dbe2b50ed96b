// Opens every page of a built site in headless Chromium, from disk and over http, at 390 and 1280 px: `make site-check`.
//
//     node scripts/site_check.mjs site [--only PART] [--axe PAGE,PAGE,...] [--screenshots FOLDER]
//
// A page fails if it scrolls sideways, if a table or a cell is cut or scrolls, if it prints a message on the console, or if it asks
// another host for anything. The search must find something, from disk too. Axe must find no serious violation on the pages of --axe, in light and
// dark. playwright-core and axe-core are read from build/browser, or from the folder in BROWSER_MODULES; CHROMIUM names the browser.

import { existsSync, readFileSync, readdirSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join, relative, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const WIDTHS = [390, 1280];
const SEARCHES = [["reference/index.html", "momentum"], ["zh/index.html", "滑动统计量"]]; // what must be found from which page
const TYPES = { ".css": "text/css", ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png" };
const BROWSERS = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome", "/opt/google/chrome/chrome"];
// Chromium's own requests are not the page's.
const SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    only: { type: "string", default: "" },
    axe: { type: "string", default: "index.html,zh/index.html,zh/tutorial/02-concepts.html,tutorial-corrections.html,findings.html,reference/layers.html" },
    screenshots: { type: "string" },
  },
});
const site = resolve(positionals[0] ?? "site");
const modules = createRequire(resolve(process.env.BROWSER_MODULES ?? "build/browser", "package.json"));
const { chromium } = modules("playwright-core");
const axe = modules.resolve("axe-core/axe.min.js");
const executablePath = process.env.CHROMIUM ?? BROWSERS.find(existsSync);

function pagesIn(folder) {
  return readdirSync(folder).flatMap((name) => {
    const path = join(folder, name);
    return statSync(path).isDirectory() ? pagesIn(path) : path.endsWith(".html") ? [relative(site, path)] : [];
  });
}

function serve() {
  const server = createServer((request, response) => {
    const path = join(site, decodeURIComponent(new URL(request.url, "http://host").pathname));
    const file = existsSync(path) && statSync(path).isDirectory() ? join(path, "index.html") : path;
    if (!file.startsWith(site) || !existsSync(file)) return response.writeHead(404).end();
    response.writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream" }).end(readFileSync(file));
  });
  return new Promise((ready) => server.listen(0, "127.0.0.1", () => ready(server)));
}

// Runs in the page.
function layoutFaults() {
  const found = [], width = document.documentElement.clientWidth, start = (element) => element.innerText.trim().replace(/\s+/g, " ").slice(0, 50);
  const scrolls = document.scrollingElement.scrollWidth;
  if (scrolls > width) found.push(`the page is ${scrolls} px wide in a window of ${width}`);
  for (const table of document.querySelectorAll("article table")) {
    const { left, right } = table.getBoundingClientRect();
    if (left < -0.5 || right > width + 0.5) found.push(`a table reaches from ${left} to ${right} in a window of ${width}: ${start(table)}`);
    for (let box = table; box && box.tagName !== "ARTICLE"; box = box.parentElement)
      if (box.scrollWidth > box.clientWidth + 1) found.push(`a table is cut: ${box.scrollWidth} px in ${box.clientWidth}: ${start(table)}`);
    for (const cell of table.querySelectorAll("th, td"))
      if (cell.scrollWidth > cell.clientWidth + 1) found.push(`a cell is cut: ${start(cell)}`);
  }
  return found;
}

const server = await serve();
const bases = [pathToFileURL(site).href, `http://127.0.0.1:${server.address().port}`];
const browser = await chromium.launch({ executablePath, args: SWITCHES });
const faults = [];

async function opened(url, options = {}) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, ...options });
  page.faults = [];
  page.on("console", (message) => page.faults.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => page.faults.push(`error: ${error.message}`));
  page.on("requestfailed", (request) => page.faults.push(`failed: ${request.url()}`));
  page.on("request", (request) => {
    if (!bases.some((base) => request.url().startsWith(base)) && !/^(data|blob|about):/.test(request.url())) page.faults.push(`asks for ${request.url()}`);
  });
  await page.goto(url);
  return page;
}

async function closed(page, name) {
  await page.close();
  faults.push(...page.faults.map((fault) => `${name}: ${fault}`));
}

async function checkPage(base, name) {
  const page = await opened(`${base}/${name}`);
  for (const width of WIDTHS) {
    await page.setViewportSize({ width, height: 900 });
    page.faults.push(...(await page.evaluate(layoutFaults)).map((fault) => `at ${width} px ${fault}`));
    if (values.screenshots && base === bases[0]) await page.screenshot({ path: join(values.screenshots, `${name.replaceAll("/", "-")}-${width}.png`), fullPage: true });
  }
  await closed(page, `${base.split(":")[0]} ${name}`);
}

async function checkSearch(base, name, words) {
  const page = await opened(`${base}/${name}`);
  await page.fill("input.md-search__input", words);
  await page.waitForSelector(".md-search-result__item", { state: "attached", timeout: 20000 }).catch(() => page.faults.push(`the search for ${words} finds nothing`));
  await closed(page, `${base.split(":")[0]} search`);
}

async function checkAxe(name) {
  for (const [colorScheme, width] of [["light", 1280], ["dark", 390]]) {
    const page = await opened(`${bases[1]}/${name}`, { colorScheme, viewport: { width, height: 900 } });
    await page.addScriptTag({ path: axe });
    const { violations } = await page.evaluate(() => window.axe.run());
    for (const { id, impact, help, nodes } of violations)
      if (["serious", "critical"].includes(impact)) page.faults.push(`axe, ${colorScheme}: ${id}: ${help}: ${nodes.slice(0, 3).map((node) => node.html.slice(0, 120)).join(" | ")} (${nodes.length})`);
    await closed(page, name);
  }
}

const pages = pagesIn(site).filter((name) => name.includes(values.only) && name !== "404.html");
const work = bases.flatMap((base) => pages.map((name) => () => checkPage(base, name)));
if (!values.only) work.push(...bases.flatMap((base) => SEARCHES.map(([name, words]) => () => checkSearch(base, name, words))));
const audited = values.axe.split(",").filter((name) => pages.includes(name));
work.push(...audited.map((name) => () => checkAxe(name)));
await Promise.all([0, 1].map(async () => { while (work.length) await work.shift()(); }));
await browser.close();
server.close();

console.log(`${pages.length} pages, from disk and over http, at ${WIDTHS.join(" and ")} px; axe on ${audited.length}; ${faults.length} faults`);
for (const fault of faults) console.log(`  ${fault}`);
process.exit(faults.length ? 1 : 0);
