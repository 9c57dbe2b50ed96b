// Numbers as readers write them, and strings of a language with numbers in them.

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

// With this many significant digits, without trailing zeros: 1.265, −0.00014, 2.1 × 10⁻⁵. What is smaller than `noise` is rounding, and 0.
export function number(value, digits = 4, noise = 1e-12) {
  if (Number.isNaN(value)) return "NaN";
  const sign = value < 0 ? "−" : "";
  const size = Math.abs(value);
  if (size === Infinity) return `${sign}∞`;
  if (size === 0 || size < noise) return "0";
  if (size >= 1e-4 && size < 1e6) return sign + Number(size.toPrecision(digits));
  const [head, exponent] = size.toExponential(digits - 1).split("e");
  const power = `10${[...String(Number(exponent))].map((character) => RAISED[character]).join("")}`;
  return sign + (Number(head) === 1 ? power : `${Number(head)} × ${power}`);
}

export const list = (values, digits) => values.map((value) => number(value, digits)).join(", ");

// The strings of one part of a table, such as of a panel: t("mean", { value: 1 }) fills {value}.
export function translator(table, part) {
  return (key, values = {}) => {
    const text = table[part]?.[key];
    if (text === undefined) throw new Error(`no string ${part}: ${key}`);
    return text.replace(/\{(\w+)\}/g, (_, name) => {
      if (!(name in values)) throw new Error(`no value {${name}} for ${part}: ${key}`);
      return typeof values[name] === "number" ? number(values[name]) : values[name];
    });
  };
}
