// Elements from plain values. Every text becomes a text node: nothing that a store says is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

/** An HTML element: attributes, `onclick` and the like for listeners, then children. */
export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);

/** An SVG element. */
export const s = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

/** A table whose first column names its rows. */
export function table(caption, head, rows) {
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      null,
      h("caption", { class: "visually-hidden" }, caption),
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          head.map((cell) => h("th", { scope: "col" }, cell)),
        ),
      ),
      h(
        "tbody",
        null,
        rows.map(([first, ...rest]) =>
          h(
            "tr",
            null,
            h("th", { scope: "row" }, first),
            rest.map((cell) => h("td", null, cell)),
          ),
        ),
      ),
    ),
  );
}

/** Names and values; a value is text or a node, a remark may follow it. */
export function facts(items, className = "facts") {
  return h(
    "dl",
    { class: className },
    items
      .filter(Boolean)
      .map(([name, value, remark]) =>
        h("div", null, h("dt", null, name), h("dd", null, value, remark ? h("small", null, remark) : null)),
      ),
  );
}

let announced;

/** Let a screen reader say this when the reader has stopped moving for a moment. */
export function announce(text, after = 400) {
  clearTimeout(announced);
  announced = setTimeout(() => {
    document.getElementById("status").textContent = text;
  }, after);
}
