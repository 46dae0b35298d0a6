// Charts as SVG, each with its numbers as a table for those who cannot see it.

import { h, s, table } from "./dom.js";
import { count, fixed, percent, plural } from "./format.js";

const WIDTH = 360;
const HEIGHT = 168;
const [LEFT, RIGHT, TOP, BOTTOM] = [40, 8, 10, 34];
let made = 0;

function described(svg, name, text) {
  const id = `chart-${(made += 1)}`;
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-labelledby", `${id}-title ${id}-text`);
  svg.prepend(s("title", { id: `${id}-title` }, name), s("desc", { id: `${id}-text` }, text));
  return svg;
}

/** How many values lie between neighbouring edges. */
export function histogram(name, { edges, counts, mean, unit }, remark) {
  const total = counts.reduce((sum, n) => sum + n, 0);
  const first = Math.max(
    0,
    counts.findIndex((n) => n > 0),
  );
  const last = Math.max(
    first,
    counts.findLastIndex((n) => n > 0),
  );
  const from = total && last - first < 4 ? Math.max(0, first - 2) : first;
  const to = total && last - first < 4 ? Math.min(counts.length - 1, last + 2) : last;
  const caption = h(
    "figcaption",
    null,
    h("strong", null, name),
    ` ${unit}`,
    h("span", { class: "muted" }, total ? `, mean ${fixed(mean)}` : ""),
  );
  if (!total) return h("figure", null, caption, h("p", { class: "muted" }, "No values are known, or read yet."));
  const shown = counts.slice(from, to + 1);
  const most = Math.max(...shown) / total;
  const [low, high] = [edges[from], edges[to + 1]];
  const x = (value) => LEFT + ((value - low) / (high - low)) * (WIDTH - LEFT - RIGHT);
  const y = (share) => TOP + (1 - share / most) * (HEIGHT - TOP - BOTTOM);
  const bars = shown.map((n, i) => {
    const [left, right] = [x(edges[from + i]), x(edges[from + i + 1])];
    const height = y(0) - y(n / total);
    const label = `${fixed(edges[from + i])} to ${fixed(edges[from + i + 1])}: ${count(n)}, ${percent(n / total)}`;
    return s(
      "rect",
      { class: "bar", x: left + 0.5, width: Math.max(right - left - 1, 0.5), y: y(n / total), height, rx: 1 },
      s("title", null, label),
    );
  });
  const ticks = axis(low, high).map((value) =>
    s(
      "text",
      {
        x: x(value),
        y: HEIGHT - BOTTOM + 15,
        "text-anchor": value === low ? "start" : value === high ? "end" : "middle",
      },
      String(+value.toFixed(2)).replace("-", "−"),
    ),
  );
  const svg = s(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart" },
    s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(most), y2: y(most) }),
    s("text", { x: LEFT - 6, y: y(most) + 4, "text-anchor": "end" }, percent(most)),
    s("text", { x: LEFT - 6, y: y(0) + 1, "text-anchor": "end" }, "0"),
    bars,
    s("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(0), y2: y(0) }),
    Number.isFinite(mean) && mean >= low && mean <= high
      ? s("line", { class: "mean", x1: x(mean), x2: x(mean), y1: y(most), y2: y(0) })
      : null,
    ticks,
    s("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, unit),
  );
  const peak = counts.indexOf(Math.max(...counts));
  const text = `${count(total)} positions, mean ${fixed(mean)}; most of them, ${percent(counts[peak] / total)}, between ${fixed(edges[peak])} and ${fixed(edges[peak + 1])}.`;
  const rows = counts.flatMap((n, i) =>
    n ? [[`${fixed(edges[i])} to ${fixed(edges[i + 1])}`, count(n), percent(n / total)]] : [],
  );
  return h(
    "figure",
    null,
    caption,
    described(svg, name, text),
    remark ? h("p", { class: "remark" }, remark) : null,
    h(
      "details",
      null,
      h("summary", null, `${name} as a table`),
      table(`${name}, ${unit}`, ["between", "positions", "share"], rows),
    ),
  );
}

/** A handful of round numbers, the ends of the axis among them. */
function axis(low, high) {
  const step = [0.1, 0.2, 0.25, 0.5, 1, 2, 4, 5, 10].find((size) => (high - low) / size <= 6) ?? (high - low) / 4;
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) values.push(value);
  return values;
}

/** Hits and misses, minute by minute: [[second of the minute, hits, misses], ...]. */
export function hitRate(history) {
  const since = Date.now() / 1000 - 3600;
  const asked = history.filter(([minute, hits, misses]) => minute > since && hits + misses > 0);
  const [hits, misses] = [1, 2].map((column) => asked.reduce((sum, row) => sum + row[column], 0));
  if (!asked.length) return h("p", { class: "muted" }, "Nobody has asked within the last hour.");
  const now = Math.floor(Date.now() / 60_000) * 60;
  const most = Math.max(...asked.map(([, a, b]) => a + b));
  const [width, height, step] = [240, 36, 4];
  const bars = asked.flatMap(([minute, a, b]) => {
    const x = width - (Math.round((now - minute) / 60) + 1) * step;
    const [up, down] = [(a / most) * height, (b / most) * height];
    return [
      s("rect", { class: "hit", x, width: step - 1, y: height - up, height: up }),
      s("rect", { class: "miss", x, width: step - 1, y: height - up - down, height: down }),
    ];
  });
  const text = `${plural(hits, "hit")} and ${plural(misses, "miss", "misses")}, ${percent(hits / (hits + misses))} hits`;
  const svg = s(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "spark", preserveAspectRatio: "none" },
    bars,
    s("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }),
  );
  const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", hour12: false });
  const rows = asked.map(([minute, a, b]) => [clock.format(minute * 1000), count(a), count(b), percent(a / (a + b))]);
  return h(
    "div",
    { class: "rate" },
    described(svg, "Hit rate over the last hour", text),
    h("p", { class: "muted" }, `Last hour: ${text}. Hits are filled, misses outlined.`),
    h(
      "details",
      null,
      h("summary", null, "Minute by minute"),
      table("Hits and misses by the minute", ["minute", "hits", "misses", "hit rate"], rows),
    ),
  );
}
