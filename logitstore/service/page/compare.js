// One document as two stores have it: where they differ, and their candidates side by side.

import { ask, Refused } from "./api.js";
import { announce, h } from "./dom.js";
import { alone, count, fixed, nats, percent } from "./format.js";
import { HELP, later, parts, startOf } from "./document.js";
import { bar, candidates, meanOf, panel, sentence } from "./position.js";
import { link, replace, whole } from "./route.js";
import { apart, apartLegend, legend, step, walk } from "./tokens.js";

const SHOWN = 24;

export async function showCompare(view, name, ref, other) {
  const t = whole(view.params, "t");
  const params = { start: startOf(t) };
  const first = await ask(["stores", name, "documents", ref], params, view.signal);
  const second = await ask(["stores", other, "documents", first.key], params, view.signal).catch((error) => {
    if (error.status !== 404) throw error;
    throw new Refused(
      404,
      `${other} does not hold this document of ${name}, token by token. Stores hold the same documents where they were built with one tokenizer from one text.`,
    );
  });
  const heading = `Document ${count(first.document)}`;
  view.title(`${name} and ${other}, ${heading.toLowerCase()}`);
  view.crumbs([
    ["Stores", []],
    [name, [name]],
    [heading, [name, first.key]],
    [`beside ${other}`, []],
  ]);

  const difference = (row) =>
    first.surprise[row] === null || second.surprise[row] === null ? NaN : first.surprise[row] - second.surprise[row];
  let by = "difference";
  const paint = (node, row) => {
    delete node.dataset.surprise;
    delete node.dataset.apart;
    if (by === "difference") node.dataset.apart = apart(difference(row));
    else node.dataset.surprise = step((by === "first" ? first : second).surprise[row]);
  };
  const side = panel(first, "Position", (row) => describeBoth(first, second, name, other, row), {
    to: (row) => walked.go(row, "click"),
    by: (rows) => walked.go(walked.at + rows, "click"),
    surprise: () => walked.go(walked.surprising(1), "click"),
  });
  const walked = walk(first, `Text of ${heading.toLowerCase()}`, paint, (row, how) => {
    side.show(row);
    if (how === "pointer") return;
    if (how !== "start") later(() => replace([name, first.key, "compare", other], { t: first.start + row }));
    if (how === "key") announce(`${sentence(first, row)} In ${other}: ${percent(Math.exp(-second.surprise[row]))}.`);
  });
  const alike = first.surprise.every((_, row) => !(Math.abs(difference(row)) >= 0.25));
  const key = h("div", null, apartLegend(name, other));
  const choose = (value) => {
    by = value;
    key.replaceChildren(value === "difference" ? apartLegend(name, other) : legend());
    walked.repaint();
  };
  const option = (value, text) =>
    h(
      "label",
      null,
      h("input", { type: "radio", name: "by", value, checked: value === by, onchange: () => choose(value) }),
      h("bdi", null, text),
    );
  view.put(
    h(
      "div",
      { class: "title" },
      h("h1", null, `${heading} `, h("small", null, h("bdi", null, name), " beside ", h("bdi", null, other))),
      h("a", { class: "button", href: link([other, first.key, "compare", name], { t }) }, "Swap"),
    ),
    totals(first, second, name, other, difference),
    alike
      ? h(
          "p",
          null,
          "Both give what followed the same probability, to 0.25 nats at every position: they differ in what they keep.",
        )
      : null,
    h(
      "fieldset",
      { class: "line" },
      h("legend", null, "Colour by"),
      option("difference", "difference"),
      option("first", name),
      option("second", other),
    ),
    h(
      "div",
      { class: "reading" },
      h(
        "section",
        { class: "passage", "aria-label": "Text" },
        key,
        h("p", { id: "walk-help", class: "remark" }, HELP),
        walked.text,
        parts(name, first, ["compare", other]),
      ),
      side.node,
    ),
  );
  walked.go((t ?? first.start) - first.start, t === undefined ? "open" : "start");
}

function totals(first, second, name, other, difference) {
  const rows = first.surprise.map((_, row) => difference(row)).filter(Number.isFinite);
  const share = (test) => percent(rows.filter(test).length / rows.length);
  const line = (text, a, b) => h("tr", null, h("th", { scope: "row" }, text), h("td", null, a), h("td", null, b));
  const mean = (answer, column) => fixed(meanOf(answer[column]));
  return h(
    "div",
    { class: "card totals" },
    h(
      "table",
      null,
      h("caption", { class: "visually-hidden" }, "The document as both stores have it"),
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          h("td", null),
          h("th", { scope: "col" }, h("bdi", null, name)),
          h("th", { scope: "col" }, h("bdi", null, other)),
        ),
      ),
      h(
        "tbody",
        null,
        line("selection", first.selection, second.selection),
        line("mean surprise, nats", mean(first, "surprise"), mean(second, "surprise")),
        line("mean entropy, nats", mean(first, "entropy"), mean(second, "entropy")),
        line("mean tail mass", percent(meanOf(first.tail_mass)), percent(meanOf(second.tail_mass))),
        line(
          "more surprised by 0.25 nats or more",
          share((d) => d >= 0.25),
          share((d) => d <= -0.25),
        ),
      ),
    ),
  );
}

function describeBoth(first, second, name, other, row) {
  const found = new Map();
  for (const [place, answer] of [first, second].entries()) {
    for (const each of candidates(answer, row)) {
      const both = found.get(each.id) ?? { id: each.id, text: each.text, label: each.label, sides: [null, null] };
      both.sides[place] = each;
      found.set(each.id, both);
    }
  }
  const size = (both) => Math.max(...both.sides.map((each) => each?.weight ?? 0));
  const all = [...found.values()].sort((a, b) => size(b) - size(a));
  const shown = all.filter((both, i) => i < SHOWN || both.label);
  const cell = (each) => {
    if (!each) return h("td", null, h("span", { class: "muted" }, "not kept"));
    const p = each.missing ? each.p : (each.p ?? each.weight);
    const kind = each.missing ? "missing" : each.tail ? "tail" : "head";
    const word = { missing: "not kept", tail: "tail", head: "" }[kind];
    return h(
      "td",
      null,
      h("span", { class: "value" }, p === null ? "–" : percent(p)),
      word ? h("small", null, ` ${word}`) : null,
      bar(each.missing ? (each.p ?? 0) : each.weight, kind),
    );
  };
  const sides = (pick) => [pick(first), pick(second)].map((value) => h("td", null, value));
  return [
    h(
      "p",
      { class: "context" },
      h("bdi", { class: "mono" }, `…${alone(first.pieces.slice(Math.max(0, row - 7), row + 1).join(""))}`),
      h("span", { "aria-hidden": "true" }, " → "),
      h("bdi", { class: "mono followed" }, alone(first.texts[first.token_ids[row + 1]])),
    ),
    h(
      "table",
      { class: "both" },
      h("caption", { class: "visually-hidden" }, "Candidates of both stores"),
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          h("th", { scope: "col" }, "token"),
          h("th", { scope: "col" }, h("bdi", null, name)),
          h("th", { scope: "col" }, h("bdi", null, other)),
        ),
      ),
      h(
        "tbody",
        null,
        h(
          "tr",
          { class: "measure" },
          h("th", { scope: "row" }, "surprise"),
          sides((answer) => nats(answer.surprise[row])),
        ),
        h(
          "tr",
          { class: "measure" },
          h("th", { scope: "row" }, "entropy"),
          sides((answer) => nats(answer.entropy[row])),
        ),
        shown.map((both) =>
          h(
            "tr",
            { class: both.label ? "label" : null },
            h(
              "th",
              { scope: "row" },
              h("bdi", { class: "mono" }, alone(both.text)),
              both.label ? h("span", { class: "tag" }, "what followed") : null,
            ),
            both.sides.map(cell),
          ),
        ),
      ),
    ),
    all.length > shown.length
      ? h("p", { class: "remark" }, `${count(all.length - shown.length)} less likely ones are not shown.`)
      : null,
  ].filter(Boolean);
}
