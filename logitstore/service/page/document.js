// One document: its text by the teacher's surprise, and what the teacher expected at each position.

import { ask } from "./api.js";
import { announce, facts, h } from "./dom.js";
import { count, fixed, percent } from "./format.js";
import { describe, meanOf, panel, sentence } from "./position.js";
import { link, replace, whole } from "./route.js";
import { legend, step, walk } from "./tokens.js";

export const AT_ONCE = 4096;
export const HELP =
  "Arrow keys walk the tokens, Home and End go to the ends, n and p to the next and previous surprise.";

/** Where an answer begins so that position t is in it. */
export const startOf = (t) => (t === undefined ? 0 : Math.floor(t / AT_ONCE) * AT_ONCE);

export async function showDocument(view, name, ref) {
  const t = whole(view.params, "t");
  const temperature = view.params.get("temperature") ?? undefined;
  const [answer, { stores }] = await Promise.all([
    ask(["stores", name, "documents", ref], { start: startOf(t), temperature }, view.signal),
    ask(["stores"], {}, view.signal),
  ]);
  const heading = `Document ${count(answer.document)}`;
  view.title(`${heading} of ${name}`);
  view.crumbs([
    ["Stores", []],
    [name, [name]],
    [heading, [name, answer.key]],
  ]);
  const here = (row) => replace([name, answer.key], { t: answer.start + row, temperature });
  const side = panel(answer, "Position", (row) => describe(answer, row), {
    to: (row) => walked.go(row, "click"),
    by: (rows) => walked.go(walked.at + rows, "click"),
    surprise: () => walked.go(walked.surprising(1), "click"),
  });
  const walked = walk(
    answer,
    `Text of ${heading.toLowerCase()}`,
    (node, row) => (node.dataset.surprise = step(answer.surprise[row])),
    (row, how) => {
      side.show(row);
      if (how === "pointer") return;
      if (how !== "start") later(() => here(row));
      if (how === "key") announce(sentence(answer, row));
    },
  );
  view.put(
    h(
      "div",
      { class: "title" },
      h("h1", null, heading, " ", h("small", null, "of ", h("bdi", null, name))),
      beside(name, answer),
    ),
    summary(answer),
    temperatures(name, answer, t),
    compareForm(name, answer, stores, () => walked.at),
    h(
      "div",
      { class: "reading" },
      h(
        "section",
        { class: "passage", "aria-label": "Text" },
        legend(),
        h("p", { id: "walk-help", class: "remark" }, HELP),
        walked.text,
        parts(name, answer),
      ),
      side.node,
    ),
  );
  walked.go((t ?? answer.start) - answer.start, t === undefined ? "open" : "start");
}

let waiting;

/** Change the address once the reader rests: browsers refuse to do so many times a second. */
export function later(change) {
  clearTimeout(waiting);
  waiting = setTimeout(change, 200);
}

function summary(answer) {
  const surprise = meanOf(answer.surprise);
  return facts(
    [
      ["tokens", count(answer.length)],
      ["mean surprise", `${fixed(surprise)} nats`, `perplexity ${fixed(Math.exp(surprise), 1)}`],
      ["mean entropy", `${fixed(meanOf(answer.entropy))} nats`],
      ["mean tail mass", percent(meanOf(answer.tail_mass))],
      ["key", h("span", { class: "hash" }, answer.key)],
    ],
    "facts card",
  );
}

function beside(name, answer) {
  const there = (number, text) =>
    number >= 0 && number < answer.documents
      ? h("a", { class: "button", href: link([name, String(number)]) }, text)
      : null;
  return h(
    "nav",
    { class: "pages", "aria-label": "Documents beside this one" },
    there(answer.document - 1, "← Previous"),
    there(answer.document + 1, "Next →"),
  );
}

/** A document of more positions than are shown at once is shown in parts. */
export function parts(name, answer, more = []) {
  const [start, end] = [answer.start, answer.start + answer.surprise.length];
  if (!start && end >= answer.length - 1) return null;
  const there = (t, text) => h("a", { class: "button", href: link([name, answer.key, ...more], { t }) }, text);
  return h(
    "nav",
    { class: "pages", "aria-label": "Parts of the document" },
    start ? there(start - AT_ONCE, "← Earlier part") : null,
    h("span", { class: "muted" }, `Positions ${count(start)} to ${count(end - 1)} of ${count(answer.length - 1)}`),
    end < answer.length - 1 ? there(end, "Later part →") : null,
  );
}

function temperatures(name, answer, t) {
  if (answer.temperatures.length < 2) return null;
  const links = answer.temperatures.map((value) =>
    h(
      "li",
      null,
      value === answer.temperature
        ? h("span", { "aria-current": "true" }, value)
        : h("a", { href: link([name, answer.key], { t, temperature: value }) }, value),
    ),
  );
  return h(
    "nav",
    { class: "temperatures", "aria-label": "Temperature" },
    h("p", null, "Candidates at temperature"),
    h("ul", null, links),
  );
}

function compareForm(name, answer, stores, at) {
  const others = stores.filter((store) => store.name !== name && !store.error);
  if (!others.length) return null;
  const sameTokens = (store) =>
    store.tokenizer.fingerprint === stores.find((each) => each.name === name)?.tokenizer.fingerprint;
  others.sort((a, b) => sameTokens(b) - sameTokens(a));
  const choice = h(
    "select",
    { id: "other" },
    others.map((store) =>
      h("option", { value: store.name }, store.name + (sameTokens(store) ? "" : " (another tokenizer)")),
    ),
  );
  const go = (event) => {
    event.preventDefault();
    location.hash = link([name, answer.key, "compare", choice.value], { t: answer.start + at() });
  };
  return h(
    "form",
    { class: "line", onsubmit: go },
    h("label", { for: "other" }, "Compare with"),
    choice,
    h("button", { type: "submit" }, "Compare"),
  );
}
