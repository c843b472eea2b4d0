// What a caption becomes outside the page: an `alt` attribute, CSV, JSON.
//
// A result is `{ file, caption, confidence, edited, error }`: `confidence` is `null` where there is none, `caption` is
// "" where the model isn't sure and for files that can't be read.

const COLUMNS = ["file", "caption", "confidence", "edited", "error"];

/** `alt="..."`, escaped for an HTML tag, as in tinycap/deploy/outputs.py. */
export function altAttribute(caption) {
  const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;" };
  return `alt="${caption.replace(/[&<>"']/g, (character) => names[character])}"`;
}

export function toCsv(results) {
  const lines = results.map((result) => COLUMNS.map((column) => csvCell(result[column])).join(","));
  return [COLUMNS.join(","), ...lines, ""].join("\r\n");
}

function csvCell(value) {
  // A spreadsheet would run a file name such as "=1+1.jpg" as a formula; JSON has the exact name.
  const text = String(value ?? "").replace(/^[=+\-@\t\r]/, "'$&");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function toJson(results) {
  return JSON.stringify(results.map((result) => Object.fromEntries(COLUMNS.map((key) => [key, result[key]]))), null, 2);
}
