// What a teacher said at one position: the token that followed, and the candidates as bars.

import { h } from "./dom.js";
import { alone, count, nats, percent, spoken } from "./format.js";

/** A row's candidates: token id, weight, own probability where known, whether of the tail, whether the label. */
export function candidates(answer, row) {
  const label = answer.token_ids[row + 1];
  const found = answer.ids[row].map((id, i) => ({
    id,
    text: answer.texts[id],
    weight: answer.weights[row][i],
    p: answer.probs?.[row][i] ?? (i < answer.head[row] ? answer.weights[row][i] : null),
    tail: i >= answer.head[row],
    label: id === label,
  }));
  const probability = answer.surprise[row] === null ? null : Math.exp(-answer.surprise[row]);
  if (!found.some((each) => each.label)) {
    found.push({
      id: label,
      text: answer.texts[label],
      weight: 0,
      p: probability,
      tail: false,
      label: true,
      missing: true,
    });
  }
  return found;
}

/** One line for a screen reader. */
export function sentence(answer, row) {
  const label = answer.token_ids[row + 1];
  const place = answer.ids[row].indexOf(label);
  const rank =
    place < 0
      ? "not among the candidates kept"
      : place < answer.head[row]
        ? `candidate ${place + 1} of ${answer.ids[row].length}`
        : "a sample of the tail";
  const p = answer.surprise[row] === null ? "probability not known" : percent(Math.exp(-answer.surprise[row]));
  return `Position ${answer.start + row}: ${spoken(answer.texts[label])}, ${p}, ${rank}.`;
}

export function bar(share, kind) {
  const filled = h("span", { class: `filled ${kind}` });
  filled.style.width = `${Math.min(100, Math.max(0, 100 * share)).toFixed(2)}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, filled);
}

function candidate(each) {
  const p = each.missing ? each.p : (each.p ?? each.weight);
  return h(
    "li",
    { class: each.label ? "candidate label" : "candidate" },
    h(
      "span",
      { class: "name" },
      h("bdi", { class: "mono" }, alone(each.text)),
      each.label ? h("span", { class: "tag" }, "what followed") : null,
    ),
    h("span", { class: "value" }, p === null ? "not known" : `${percent(p)}`),
    bar(each.missing ? (each.p ?? 0) : each.weight, each.missing ? "missing" : each.tail ? "tail" : "head"),
  );
}

/** Everything at row i, as nodes. */
export function describe(answer, row) {
  const all = candidates(answer, row);
  const drawn = answer.selection.startsWith("random");
  const [head, tail, missing] = [
    all.filter((c) => !c.tail && !c.missing),
    all.filter((c) => c.tail),
    all.filter((c) => c.missing),
  ];
  const surprise = answer.surprise[row];
  const context = answer.pieces.slice(Math.max(0, row - 7), row + 1).join("");
  const more = answer.kept[row] - answer.ids[row].length;
  const group = (title, some) =>
    some.length ? [h("h3", null, title), h("ol", { class: "candidates" }, some.map(candidate))] : [];
  return [
    h(
      "p",
      { class: "context" },
      h("span", { class: "visually-hidden" }, "After "),
      h("bdi", { class: "mono" }, `${row > 7 || answer.start ? "…" : ""}${alone(context)}`),
      h("span", { "aria-hidden": "true" }, " → "),
      h("bdi", { class: "mono followed" }, alone(answer.texts[answer.token_ids[row + 1]])),
    ),
    h(
      "dl",
      { class: "measures" },
      h(
        "div",
        null,
        h("dt", null, "probability"),
        h("dd", null, surprise === null ? "–" : percent(Math.exp(-surprise))),
      ),
      h("div", null, h("dt", null, "surprise"), h("dd", null, nats(surprise))),
      h("div", null, h("dt", null, "entropy"), h("dd", null, nats(answer.entropy[row]))),
      drawn ? null : h("div", null, h("dt", null, "tail mass"), h("dd", null, percent(answer.tail_mass[row]))),
    ),
    ...group("What followed is not kept", missing),
    ...group(drawn ? "Drawn, by how often" : "Head: kept exactly", head),
    ...group(`Tail: ${count(tail.length)} sampled, standing for ${percent(answer.tail_mass[row])} together`, tail),
    more > 0 ? h("p", { class: "remark" }, `${count(more)} more are kept and not shown.`) : null,
  ].filter(Boolean);
}

/** A panel that shows one row at a time, with its own way to move: a slider and buttons, for those who have no keys. */
export function panel(answer, heading, describeRow, move) {
  const title = h("h2", { id: "position" });
  const slider = h("input", {
    type: "range",
    min: 0,
    max: answer.surprise.length - 1,
    step: 1,
    "aria-label": "Position",
    oninput: () => move.to(Number(slider.value)),
  });
  const body = h("div", { class: "position", tabindex: 0, role: "group", "aria-label": "What the teacher expected" });
  const button = (text, label, onclick) =>
    h("button", { type: "button", "aria-label": label, title: label, onclick }, text);
  const node = h(
    "aside",
    { class: "panel card", "aria-labelledby": "position" },
    h(
      "div",
      { class: "panel-head" },
      title,
      h(
        "div",
        { class: "buttons" },
        button("←", "Previous token", () => move.by(-1)),
        button("→", "Next token", () => move.by(1)),
        button("⇥", "Next surprise (n)", move.surprise),
      ),
    ),
    slider,
    body,
  );
  return {
    node,
    show(row) {
      title.textContent = `${heading} ${count(answer.start + row)}`;
      slider.value = row;
      slider.setAttribute("aria-valuetext", sentence(answer, row));
      body.replaceChildren(...describeRow(row));
      body.scrollTop = 0;
    },
  };
}

export const meanOf = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : NaN;
};
