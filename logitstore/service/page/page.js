// The page of `logitstore serve`: which view the address names, and what is the same around all of them.

import { Refused, token } from "./api.js";
import { h } from "./dom.js";
import { link, read } from "./route.js";
import { showCompare } from "./compare.js";
import { showDocument } from "./document.js";
import { showStore } from "./store.js";
import { showStores } from "./stores.js";

const main = document.getElementById("content");
const forget = document.getElementById("forget");
let leaving = new AbortController();
let shown = false;

const views = {
  0: () => showStores,
  1:
    ([name]) =>
    (view) =>
      showStore(view, name),
  2:
    ([name, ref]) =>
    (view) =>
      showDocument(view, name, ref),
  4: ([name, ref, word, other]) => (word === "compare" ? (view) => showCompare(view, name, ref, other) : undefined),
};

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { parts, params } = read();
  const put = (...nodes) => {
    if (signal.aborted) return;
    main.replaceChildren(...nodes.filter(Boolean));
    if (shown) {
      main.focus({ preventScroll: true });
      scrollTo(0, 0);
    }
    shown = true;
  };
  const view = { params, signal, title, crumbs, put };
  forget.hidden = !token.get();
  main.setAttribute("aria-busy", "true");
  try {
    const draw = views[parts.length]?.(parts);
    if (!draw) throw new Refused(404, "There is nothing at this address.");
    await draw(view);
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    if (error instanceof Refused) return refused(error);
    refused(new Refused(0, "The page met something that it does not know how to show."));
    throw error;
  } finally {
    if (!signal.aborted) main.removeAttribute("aria-busy");
  }
}

function title(text) {
  document.title = text ? `${text} – logitstore` : "logitstore";
}

/** The way here: [text, parts of its address] each, the last one being this page. */
function crumbs(items) {
  const list = items.map(([text, parts], i) =>
    h(
      "li",
      null,
      i === items.length - 1 ? h("span", { "aria-current": "page" }, text) : h("a", { href: link(parts) }, text),
    ),
  );
  document.getElementById("crumbs").replaceChildren(h("ol", null, list));
}

function refused(error) {
  if (error.status === 401) return askForToken(error.message);
  title("Not there");
  crumbs([]);
  main.replaceChildren(
    h(
      "section",
      { class: "notice" },
      h("h1", null, error.status === 404 ? "Not there" : error.status === 403 ? "Not allowed" : "That did not work"),
      h("p", { role: "alert" }, error.message),
      h(
        "p",
        null,
        h("button", { type: "button", onclick: show }, "Try again"),
        " ",
        h("a", { href: "#/" }, "All stores"),
      ),
    ),
  );
}

function askForToken(message) {
  title("Token");
  crumbs([]);
  const wrong = token.get() !== null;
  token.forget();
  forget.hidden = true;
  const field = h("input", {
    type: "password",
    id: "token",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    "aria-describedby": "token-help",
  });
  const enter = (event) => {
    event.preventDefault();
    if (!field.value.trim()) return;
    token.set(field.value.trim());
    show();
  };
  main.replaceChildren(
    h(
      "section",
      { class: "notice" },
      h("h1", null, "This service asks for a token"),
      wrong ? h("p", { role: "alert" }, message) : null,
      h(
        "form",
        { class: "line", onsubmit: enter },
        h("label", { for: "token" }, "Token"),
        field,
        h("button", { type: "submit" }, "Open"),
      ),
      h(
        "p",
        { id: "token-help", class: "muted" },
        "It is kept in this tab alone, and sent to this service alone. Whoever runs the service gives it to you.",
      ),
    ),
  );
  field.focus();
}

forget.addEventListener("click", () => {
  token.forget();
  show();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view, and stays
  main.focus();
});
addEventListener("hashchange", show);
show();
