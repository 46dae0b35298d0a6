// One store: its histograms, and its documents sorted and searched by what the teacher made of them.

import { ask, Refused } from "./api.js";
import { histogram, hitRate } from "./charts.js";
import { facts, h } from "./dom.js";
import { count, fixed, inText, percent, plural } from "./format.js";
import { link, replace, whole } from "./route.js";
import { about, numbers } from "./stores.js";
import { step } from "./tokens.js";

const AT_ONCE = 50;
const AGAIN_MS = 300;
const MEASURES = [
  ["length", "tokens", (value) => count(value)],
  ["nll", "surprise", (value) => fixed(value)],
  ["entropy", "entropy", (value) => fixed(value)],
  ["correct", "foretold", (value) => percent(value)],
  ["tail_mass", "tail mass", (value) => percent(value)],
];
const HISTOGRAMS = [
  ["entropy", "Entropy", "How unsure the teacher was."],
  ["tail_mass", "Tail mass", "What lies outside the entries kept exactly."],
  ["label_log_prob", "Label log-prob", "How probable the teacher found what followed."],
];

export async function showStore(view, name) {
  const store = await ask(["stores", name], {}, view.signal);
  if (store.error) throw new Refused(503, store.error);
  view.title(name);
  view.crumbs([
    ["Stores", []],
    [name, [name]],
  ]);
  const charts = h("div", { class: "charts" });
  const progress = h("p", { class: "muted", role: "status" });
  const list = listing(view, name);
  view.put(
    h("h1", null, name),
    about(store),
    facts(numbers(store), "facts card"),
    h(
      "section",
      { "aria-labelledby": "positions" },
      h("h2", { id: "positions" }, "Position by position"),
      progress,
      charts,
    ),
    list.node,
    h("section", { "aria-labelledby": "asked" }, h("h2", { id: "asked" }, "Hit rate"), hitRate(store.history ?? [])),
  );
  await list.load();
  follow(view, name, charts, progress).catch((error) => {
    if (error.name !== "AbortError") progress.textContent = error.message;
  });
}

/** Draw the histograms, and again while the service reads the store. */
async function follow(view, name, charts, progress) {
  for (let drawn = false; !view.signal.aborted; drawn = true) {
    const stats = await ask(["stores", name, "stats"], {}, view.signal);
    if (!drawn || stats.finished) {
      charts.replaceChildren(
        ...HISTOGRAMS.map(([key, title, remark]) => histogram(title, stats.histograms[key], remark)),
      );
    }
    progress.textContent =
      stats.scanned === stats.of
        ? `The label is kept in ${percent(stats.label_in_head + stats.label_in_tail)} of ${plural(stats.positions, "position")}; the teacher's perplexity on the labels is ${fixed(stats.teacher_perplexity, 1)}.`
        : `Read so far: ${count(stats.scanned)} of ${plural(stats.of, "document")}.`;
    if (stats.finished) return;
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

function listing(view, name) {
  const asked = {
    sort: view.params.get("sort") ?? "",
    descending: view.params.get("descending") === "true",
    where: view.params.getAll("where"),
    text: view.params.get("text") ?? "",
    offset: whole(view.params, "offset") ?? 0,
  };
  const sort = h(
    "select",
    { id: "sort" },
    h("option", { value: "" }, "the store's order"),
    MEASURES.map(([key, word]) => h("option", { value: key }, word)),
  );
  const order = h(
    "select",
    { id: "order" },
    h("option", { value: "false" }, "lowest first"),
    h("option", { value: "true" }, "highest first"),
  );
  const text = h("input", { id: "text", type: "search", autocomplete: "off", placeholder: "any part of the text" });
  const where = h("input", {
    id: "where",
    type: "text",
    autocomplete: "off",
    spellcheck: "false",
    autocapitalize: "off",
    placeholder: "nll>3, length<500",
    "aria-describedby": "where-help",
  });
  const told = h("p", { class: "told", role: "status" });
  const body = h("tbody", { role: "rowgroup" });
  const heads = new Map(
    MEASURES.map(([key, word]) => [
      key,
      h("th", { scope: "col", role: "columnheader" }, h("button", { type: "button", onclick: () => turn(key) }, word)),
    ]),
  );
  const pages = h("nav", { class: "pages", "aria-label": "Pages of documents" });
  sort.value = asked.sort;
  order.value = String(asked.descending);
  text.value = asked.text;
  where.value = asked.where.join(", ");

  function turn(key) {
    asked.descending = asked.sort === key ? !asked.descending : true;
    sort.value = key;
    order.value = String(asked.descending);
    submit();
  }

  function submit(event) {
    event?.preventDefault();
    Object.assign(asked, { sort: sort.value, descending: order.value === "true", text: text.value, offset: 0 });
    asked.where = where.value
      .split(",")
      .map((one) => one.trim())
      .filter(Boolean);
    load();
  }

  function go(offset) {
    asked.offset = offset;
    load().then(() => node.querySelector("h2").scrollIntoView());
  }

  let turns = 0;

  async function load() {
    const mine = (turns += 1);
    replace([name], { ...asked, descending: asked.descending || undefined, offset: asked.offset || undefined });
    try {
      for (;;) {
        const found = await ask(["stores", name, "documents"], { ...asked, limit: AT_ONCE }, view.signal);
        if (mine !== turns) return;
        draw(found);
        if (found.finished || !(asked.sort || asked.text || asked.where.length)) return;
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
        if (mine !== turns) return;
      }
    } catch (error) {
      if (!(error instanceof Refused) || error.status === 401) throw error;
      body.replaceChildren();
      pages.replaceChildren();
      told.textContent = error.message;
    }
  }

  function draw(found) {
    const focused = body.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    for (const [key, head] of heads) {
      if (key === asked.sort) head.setAttribute("aria-sort", asked.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    body.replaceChildren(...found.documents.map((row) => documentRow(name, row)));
    if (focused) [...body.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus();
    const chosen = asked.text || asked.where.length;
    const reading =
      found.finished || !(asked.sort || chosen) ? "" : ` Read so far: ${count(found.scanned)} of ${count(found.of)}.`;
    const partly =
      asked.text && found.searched < found.scanned
        ? ` Texts were searched in the first ${count(found.searched)} documents.`
        : "";
    const range = found.documents.length
      ? `, ${count(found.offset + 1)} to ${count(found.offset + found.documents.length)} shown`
      : "";
    told.textContent = `${plural(found.matching, "document")}${chosen ? (found.matching === 1 ? " fits" : " fit") : ""}${range}.${reading}${partly}`;
    const more = found.offset + found.documents.length < found.matching;
    pages.hidden = !(found.offset || more);
    pages.replaceChildren(
      h(
        "button",
        { type: "button", disabled: !found.offset, onclick: () => go(Math.max(0, found.offset - AT_ONCE)) },
        "← Earlier",
      ),
      h("button", { type: "button", disabled: !more, onclick: () => go(found.offset + AT_ONCE) }, "Later →"),
    );
  }

  const field = (label, control) => h("div", { class: "field" }, h("label", { for: control.id }, label), control);
  const node = h(
    "section",
    { "aria-labelledby": "documents" },
    h("h2", { id: "documents" }, "Documents"),
    h(
      "form",
      { class: "ask card", role: "search", "aria-label": "Documents", onsubmit: submit },
      field("Text has", text),
      field("Where", where),
      field("Sort by", sort),
      field("Order", order),
      h("button", { type: "submit" }, "Show"),
      h(
        "p",
        { id: "where-help", class: "remark" },
        "Conditions with commas between them, on length, nll, entropy, correct, disagreement or tail_mass. Surprise is nll, the mean of −log p of what followed, in nats; foretold, the share of tokens that the teacher found likeliest.",
      ),
    ),
    told,
    h(
      "table",
      { class: "documents", role: "table", "aria-labelledby": "documents" },
      h(
        "thead",
        { role: "rowgroup" },
        h("tr", { role: "row" }, h("th", { scope: "col", role: "columnheader" }, "document"), [...heads.values()]),
      ),
      body,
    ),
    pages,
  );
  return { node, load };
}

function documentRow(name, row) {
  const begins = inText(row.begins).replace(/\s+/g, " ").trim() || "(no text)";
  const cells = MEASURES.map(([key, word, format]) => {
    const value = row[key];
    const shade = key === "nll" && value !== null ? step(value) : undefined;
    return h(
      "td",
      { role: "cell", "data-name": word },
      h("span", { "data-surprise": shade }, value === null ? "–" : format(value)),
    );
  });
  return h(
    "tr",
    { role: "row" },
    h(
      "th",
      { scope: "row", role: "rowheader" },
      h("a", { href: link([name, row.key]) }, h("bdi", null, begins)),
      h("small", null, `number ${count(row.document)}`),
    ),
    cells,
  );
}
