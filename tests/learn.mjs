// Runs functions of the page's modules under node. Reads {"root", "calls": [[module, function, arguments], ...]} on stdin, prints the results.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { root, calls } = JSON.parse(readFileSync(0, "utf8"));
const results = [];
for (const [module, name, given] of calls) {
  const found = (await import(pathToFileURL(`${root}/${module}`)))[name];
  results.push(typeof found === "function" ? found(...given) : found);
}
console.log(JSON.stringify(results));
