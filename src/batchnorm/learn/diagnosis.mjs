// Reads the JSON that `batchnorm diagnose --json` writes (batchnorm/diagnostics/formats.py).

const SCHEMA = 1;
const NOT_FINITE = { nan: NaN, inf: Infinity, "-inf": -Infinity };

// { diagnosis } with numbers as numbers, or { problem }, a string of the frame: not-json, not-diagnosis or other-schema.
export function readDiagnosis(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    return { problem: "not-json" };
  }
  if (!isTable(data) || !Array.isArray(data.findings) || !isTable(data.layers)) return { problem: "not-diagnosis" };
  if (data.schema !== SCHEMA) return { problem: "other-schema" };
  const wellFormed = data.findings.every((each) => isTable(each) && typeof each.code === "string" && Array.isArray(each.layers) && isTable(each.evidence));
  if (!wellFormed || !Object.values(data.layers).every(isTable)) return { problem: "not-diagnosis" };
  const findings = data.findings.map((each) => ({ ...each, evidence: numbers(each.evidence) }));
  const layers = Object.fromEntries(Object.entries(data.layers).map(([name, row]) => [name, numbers(row)]));
  return { diagnosis: { ...data, findings, layers } };
}

// The panel that explains a finding: that of the longest beginning of its code in the table.
export function panelOf(code, findings) {
  const beginning = Object.keys(findings).filter((each) => code.startsWith(each)).sort((a, b) => b.length - a.length)[0];
  return findings[beginning];
}

const isTable = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const numbers = (row) => Object.fromEntries(Object.entries(row).map(([name, value]) => [name, Array.isArray(value) ? value.map(numbers) : (NOT_FINITE[value] ?? value)]));
