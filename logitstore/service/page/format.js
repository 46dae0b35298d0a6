// Numbers and token texts as people read them.

const whole = new Intl.NumberFormat("en");

export const count = (value) => (Number.isFinite(value) ? whole.format(value) : "–");
export const fixed = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  for (const [unit, name] of [
    [1e12, "TB"],
    [1e9, "GB"],
    [1e6, "MB"],
    [1e3, "kB"],
  ]) {
    if (value >= unit) return `${(value / unit).toPrecision(3)} ${name}`;
  }
  return `${value} bytes`;
}

/** A probability: 43 %, 2.1 %, 0.04 %, < 0.01 %. */
export function percent(p) {
  if (!Number.isFinite(p)) return "–";
  const value = 100 * p;
  if (value === 0) return "0 %";
  if (value < 0.01) return "< 0.01 %";
  if (value >= 99.95) return "100 %";
  return `${value >= 9.95 ? value.toFixed(value >= 99 ? 1 : 0) : value >= 0.995 ? value.toFixed(1) : value.toFixed(2)} %`;
}

export const nats = (value) => (Number.isFinite(value) ? `${value.toFixed(2)} nats` : "not known");

// Characters that show nothing or that turn the text around them: controls, bidirectional marks, zero-width, private.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/gu;
const named = (character) => `‹${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;

/** A token within the text: as it is, but for what would not be seen or would reorder its neighbours. */
export const inText = (text) => text.replace(UNSEEN, named);

/** A token by itself: spaces and line ends are shown too. */
export function alone(text) {
  if (text === "") return "(nothing)";
  return inText(text)
    .replace(/^ +| +$|^ +$/g, (spaces) => "␣".repeat(spaces.length))
    .replace(/\n/g, "⏎")
    .replace(/\t/g, "⇥");
}

/** A token as a screen reader should say it. */
export function spoken(text) {
  if (text === "") return "nothing";
  if (/^ +$/.test(text)) return text.length === 1 ? "a space" : `${text.length} spaces`;
  if (/^\n+$/.test(text)) return text.length === 1 ? "a line end" : `${text.length} line ends`;
  return `“${inText(text).replace(/\n/g, " line end ").trim()}”`;
}
