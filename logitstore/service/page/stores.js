// The first view: which stores there are, what made them, and who teaches.

import { ask, Refused } from "./api.js";
import { hitRate } from "./charts.js";
import { facts, h } from "./dom.js";
import { bytes, count, fixed, percent, plural } from "./format.js";
import { link } from "./route.js";

const EVERY_MS = 5000;

export async function showStores(view) {
  const found = await ask(["stores"], {}, view.signal);
  view.title("");
  view.crumbs([]);
  const list = h("ul", { class: "cards" });
  const troubled = h("p", { class: "muted", role: "status" });
  const drawn = new Map();
  const draw = ({ stores }) => {
    const names = stores.map((store) => store.name);
    if (names.join("\n") !== [...drawn.keys()].join("\n")) {
      drawn.clear();
      for (const store of stores) drawn.set(store.name, card(store.name));
      list.replaceChildren(...[...drawn.values()].map((each) => each.node));
    }
    for (const store of stores) drawn.get(store.name).update(store);
  };
  draw(found);
  view.put(
    h("h1", null, found.stores.length ? "Stores" : "No stores yet"),
    found.stores.length
      ? h("p", { class: "lead" }, `${plural(found.stores.length, "store")} of what teachers said, token by token.`)
      : h(
          "p",
          { class: "lead" },
          "Type ",
          h("code", null, "logitstore build --teacher T --dataset D --out S.zarr"),
          " in the folder that is served, and it appears here.",
        ),
    list,
    troubled,
    h("p", { class: "muted foot" }, `logitstore ${found.version} · `, h("a", { href: "docs" }, "the HTTP contract")),
  );
  poll(view, draw, troubled);
}

/** Ask again while somebody looks; a service that is away for a moment is no reason to take the page away. */
function poll(view, draw, troubled) {
  const timer = setInterval(async () => {
    if (document.hidden) return;
    try {
      draw(await ask(["stores"], {}, view.signal));
      if (troubled.textContent) troubled.textContent = "";
    } catch (error) {
      if (!(error instanceof Refused)) return;
      if (!troubled.textContent) troubled.textContent = `${error.message} What is shown is from before.`;
    }
  }, EVERY_MS);
  view.signal.addEventListener("abort", () => clearInterval(timer));
}

function card(name) {
  const body = h("div");
  const state = h("p", { class: "state" });
  const rate = h("div");
  let [before, asked] = ["", ""];
  return {
    node: h("li", { class: "card" }, h("h2", null, h("a", { href: link([name]) }, name)), state, body, rate),
    update(store) {
      const seen = JSON.stringify({ ...store, history: undefined, hits: undefined, misses: undefined });
      if (seen !== before) {
        state.replaceChildren(...teaching(store));
        body.replaceChildren(
          ...(store.error ? [h("p", { role: "alert" }, store.error)] : [about(store), facts(numbers(store))]),
        );
        before = seen;
      }
      const rated = JSON.stringify([store.hits, store.misses, store.history]);
      if (rated !== asked) {
        const open = rate.querySelector("details")?.open;
        rate.replaceChildren(hitRate(store.history ?? []));
        if (open) rate.querySelector("details")?.setAttribute("open", "");
        asked = rated;
      }
    },
  };
}

export function about(store) {
  const { teacher, tokenizer } = store;
  return h(
    "p",
    { class: "about" },
    h("strong", null, teacher.name),
    ` ${teacher.quantization ? `(${teacher.quantization})` : ""} · tokenizer of ${count(tokenizer.size)} tokens `,
    h("span", { class: "hash", title: tokenizer.fingerprint }, tokenizer.fingerprint.slice(0, 8)),
    ` · ${store.selection}${temperatures(store.temperatures)}`,
  );
}

const temperatures = (some) => (some.length === 1 && some[0] === 1 ? "" : ` at temperature ${some.join(", ")}`);

/** What matters most of a store: [name, value, remark]. */
export function numbers(store) {
  const fidelity = store.fidelity;
  const angle = Array.isArray(fidelity?.angles) ? fidelity.angles.at(-1) : undefined;
  return [
    ["documents", count(store.documents)],
    ["tokens", count(store.positions)],
    ["bytes per token", fixed(store.bytes_per_token, 1), bytes(store.disk_bytes)],
    [
      "fidelity",
      angle ? `${fixed(angle[1], 1)}°` : "–",
      angle ? `off the full gradient over ${count(angle[0])} positions` : "not measured",
    ],
    [
      "coverage",
      fidelity ? percent(fidelity.kept_mass) : "–",
      fidelity ? "of the probability kept exactly" : "not measured",
    ],
    [
      "hit rate",
      store.hits + store.misses ? percent(store.hits / (store.hits + store.misses)) : "–",
      store.hits + store.misses ? `of ${count(store.hits + store.misses)} asked` : "nobody asked yet",
    ],
  ];
}

/** Who answers what a store lacks, and how much waits for it. */
function teaching(store) {
  const [dot, words] = teacher(store);
  const { documents = 0, tokens = 0 } = store.queue ?? {};
  const waiting = documents
    ? `${plural(documents, "document")}, ${plural(tokens, "token")} in the queue`
    : "nothing in the queue";
  return [h("span", { class: `dot ${dot}`, "aria-hidden": "true" }), store.teaches ? `${words} · ${waiting}` : words];
}

function teacher(store) {
  if (store.error) return ["lost", "Damaged"];
  if (store.teacher_state === "none") return ["none", "Nobody teaches; what it lacks stays a miss"];
  if (store.teacher_state === "lost") return ["lost", "The teacher is gone; what it lacks stays a miss"];
  if (!store.teaches) return ["none", "The teacher is another's; what it lacks stays a miss"];
  return store.teacher_state === "ready" ? ["teaches", "The teacher is ready"] : ["waits", "The teacher is loading"];
}
