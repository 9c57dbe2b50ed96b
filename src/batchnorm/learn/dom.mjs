// Elements, and text with `code` and *emphasis*.

const SVG = "http://www.w3.org/2000/svg";

// make("p", { class: "note" }, "text"); names that begin with "svg:" are of SVG. Attributes that are false or undefined are left out.
export function make(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function rich(text) {
  return text
    .split(/(`[^`]+`|\*[^*]+\*)/)
    .filter(Boolean)
    .map((piece) => {
      if (piece[0] === "`") return make("code", {}, piece.slice(1, -1));
      return piece[0] === "*" && piece.length > 2 ? make("em", {}, piece.slice(1, -1)) : piece;
    });
}

// Several lines are paragraphs.
export const paragraphs = (text) => text.split("\n").map((line) => make("p", {}, ...rich(line)));
