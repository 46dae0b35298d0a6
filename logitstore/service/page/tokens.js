// A document's text, token by token: coloured, walked by arrow keys, and under the pointer.

import { h } from "./dom.js";
import { inText, percent } from "./format.js";

const SURPRISE = [0.5, 1, 2, 3, 4.5, 6.5, 9];
const APART = [0.25, 1, 2.5];

/** Which of the colours a surprise in nats has: 0, none, to 7. */
export const step = (nats) => (Number.isFinite(nats) ? SURPRISE.filter((edge) => nats >= edge).length : 0);

/** Which colour a difference of two surprises has: "a1" to "a3" where the first is larger, "b1" to "b3", or "0". */
export function apart(nats) {
  const size = APART.filter((edge) => Math.abs(nats) >= edge).length;
  return Number.isFinite(nats) && size ? (nats > 0 ? "a" : "b") + size : "0";
}

export function legend() {
  const swatches = [0, ...SURPRISE].map((edge, i) =>
    h("li", null, h("span", { class: "swatch", "data-surprise": i, "aria-hidden": "true" }), i ? `${edge}` : "0"),
  );
  return h(
    "div",
    { class: "legend" },
    h("p", null, "Surprise, nats, from"),
    h("ol", null, swatches),
    h(
      "p",
      { class: "muted" },
      `0.5 is a probability of ${percent(Math.exp(-0.5))}, 3 of ${percent(Math.exp(-3))}; underlined from 6.5, ${percent(Math.exp(-6.5))}.`,
    ),
  );
}

export function apartLegend(first, second) {
  const side = (letter) =>
    [1, 2, 3].map((i) =>
      h("li", null, h("span", { class: "swatch", "data-apart": letter + i, "aria-hidden": "true" }), `${APART[i - 1]}`),
    );
  return h(
    "div",
    { class: "legend" },
    h("p", null, h("bdi", null, first), " more surprised, nats, from"),
    h("ol", null, side("a")),
    h("p", null, h("bdi", null, second), " more surprised, from"),
    h("ol", null, side("b")),
    h("p", { class: "muted" }, "From 2.5 on a line is over the token, or under it."),
  );
}

/** Text that is walked.
 *
 * answer: as the service gave it. paint(node, row): colours the token that row i foretells. tell(row, how): row i is to
 * be shown, because of "pointer", "key", "click" or "start".
 */
export function walk(answer, label, paint, tell) {
  const { pieces, special } = answer;
  const ids = answer.token_ids;
  const unprinted = new Set(special);
  const nodes = pieces.map((piece, i) => token(piece, ids[i], unprinted, answer.texts));
  const text = h(
    "div",
    {
      class: "text",
      id: "text-walk",
      tabindex: 0,
      role: "group",
      "aria-label": label,
      "aria-describedby": "walk-help",
    },
    nodes,
  );
  nodes.forEach((node, i) => {
    node.dataset.i = i;
    if (i) paint(node, i - 1);
    else if (!answer.start) node.classList.add("first"); // nothing foretells it
  });
  const last = nodes.length - 2;
  let [at, over] = [0, null];

  const mark = (row, className, on) => nodes[row + 1].classList.toggle(className, on);
  function go(row, how) {
    hover(null);
    mark(at, "here", false);
    at = Math.min(Math.max(row, 0), last);
    mark(at, "here", true);
    if (how === "key" || how === "start")
      nodes[at + 1].scrollIntoView({ block: how === "start" ? "center" : "nearest" });
    tell(at, how);
  }
  function hover(row) {
    if (row === over) return;
    if (over !== null) mark(over, "over", false);
    over = row;
    if (row !== null) mark(row, "over", true);
  }

  const rowOf = (target) => {
    const i = target.closest?.("[data-i]")?.dataset.i;
    return i === undefined ? null : Math.max(Number(i) - 1, 0);
  };
  let moved = "";
  text.addEventListener("pointermove", (event) => {
    const place = `${event.clientX} ${event.clientY}`;
    if (event.pointerType === "touch" || place === moved) return; // the text may scroll below a pointer at rest
    moved = place;
    const row = rowOf(event.target);
    if (row === null || row === over) return;
    hover(row);
    tell(row, "pointer");
  });
  text.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "touch") return;
    hover(null);
    tell(at, "pointer");
  });
  text.addEventListener("click", (event) => {
    const row = rowOf(event.target);
    if (row !== null) go(row, "click");
  });

  /** The token of the next line up or down that lies nearest below or above this one. */
  function line(direction) {
    const rect = (i) => nodes[i].getClientRects()[0] ?? nodes[i].getBoundingClientRect();
    const from = rect(at + 1);
    let [best, distance, top] = [at, Infinity, null];
    for (let i = at + 1 + direction; i >= 1 && i < nodes.length; i += direction) {
      const there = rect(i);
      if (Math.abs(there.top - from.top) < 4) continue;
      top ??= there.top;
      if (Math.abs(there.top - top) > 4) break;
      if (Math.abs(there.left - from.left) < distance) [best, distance] = [i - 1, Math.abs(there.left - from.left)];
    }
    return best;
  }
  const keys = {
    ArrowRight: () => at + 1,
    ArrowLeft: () => at - 1,
    ArrowDown: () => line(1),
    ArrowUp: () => line(-1),
    PageDown: () => at + 50,
    PageUp: () => at - 50,
    Home: () => 0,
    End: () => last,
    n: () => surprising(1),
    p: () => surprising(-1),
  };
  const surprising = (direction) => {
    for (let row = at + direction; row >= 0 && row <= last; row += direction)
      if (answer.surprise[row] >= 4.5) return row;
    return at;
  };
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    go(keys[event.key](), "key");
  });
  return {
    text,
    go,
    surprising,
    repaint: () => nodes.forEach((node, i) => i && paint(node, i - 1)),
    last,
    get at() {
      return at;
    },
  };
}

function token(piece, id, special, texts) {
  if (special.has(id)) return h("span", { class: "token special" }, inText(texts[id]) || `‹${id}›`);
  if (piece === "") return h("span", { class: "token cut", title: texts[id] }, "·");
  return h("span", { class: piece.includes("\n") ? "token ends" : "token" }, inText(piece));
}
