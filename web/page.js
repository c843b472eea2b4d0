// The page: a list of photos, captioned one after the other by the worker in captioner.js, and found by words.

import { dropped, listed, openCamera } from "./inputs.js";
import { altAttribute, toCsv, toJson } from "./rows.js";

const $ = (id) => document.getElementById(id);

// `{ name, file, state, caption, confidence, embedding, score, edited, error, element }`; `state` is waiting, running,
// done or failed, `score` the similarity to the words searched for, and `file` is let go when it is no longer needed.
let rows = [];
let leftOut = 0;
let stopped = false;
let running = false;
let worker;
// Shown with the status until the model is loaded.
let modelState = "loading the model";

// --- the worker -----------------------------------------------------------------------------------------------------

/** Starts the worker; resolves with its `ready` message. */
function startWorker() {
  worker = new Worker("captioner.js", { type: "module" });
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => (data.ready ? resolve(data.ready) : reject(new Error(data.fatal)));
    worker.onerror = () => reject(new Error("this browser can't run the captioner"));
  });
}

/** Rejects the searches that a worker hasn't answered yet. */
const searches = new Set();

/** Captions a row's file; resolves with the last message about it. */
async function caption(row) {
  await model;
  return new Promise((resolve) => {
    worker.onmessage = ({ data }) => {
      if ("partial" in data) row.element.querySelector("textarea").value = data.partial;
      else if (data.thumbnail) showThumbnail(row, data);
      else resolve(data);
    };
    worker.onerror = () => {
      // Out of memory, for instance: the others get a new worker.
      worker.terminate();
      model = startWorker();
      for (const reject of searches) reject(new Error("please try again"));
      searches.clear();
      resolve({ error: "the captioner failed on this photo" });
    };
    worker.postMessage({ file: row.file, numBeams: Number($("beams").value) });
  });
}

/** Captions the waiting rows in order; does nothing while it is already running. */
async function run() {
  if (running) return;
  running = true;
  for (let row; !stopped && (row = rows.find((each) => each.state === "waiting")); ) {
    row.state = "running";
    render(row);
    const answer = await caption(row).catch(({ message }) => ({ error: message }));
    const { caption: text = "", confidence = null, embedding = null, error = null } = answer;
    const state = error === null ? "done" : "failed";
    Object.assign(row, { file: null, caption: text, confidence, embedding, error, state });
    render(row);
    if ($("query").value.trim()) sortRows();
  }
  running = false;
  renderStatus();
  // The search works offline too; its files come after the first captions.
  if (rows.length > 0) navigator.serviceWorker?.controller?.postMessage("store the rest");
}

/** Similarities of rows with embeddings to a query, by the worker. */
async function similarities(query, found) {
  await model;
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve, reject) => {
    searches.add(reject);
    port1.onmessage = ({ data: { scores, error } }) => {
      port1.close();
      searches.delete(reject);
      if (scores) resolve(scores);
      else reject(new Error(error));
    };
    worker.postMessage({ query, embeddings: found.map(({ embedding }) => embedding) }, [port2]);
  });
}

// --- rows -----------------------------------------------------------------------------------------------------------

function isUnsure(row) {
  return row.confidence !== null && row.confidence * 100 < Number($("threshold").value);
}

/** The text of a row: as edited, else the caption unless the model isn't sure. */
function textOf(row) {
  return row.edited ?? (isUnsure(row) ? "" : row.caption);
}

function add(found) {
  const images = found.filter(({ file }) => file.type.startsWith("image/"));
  leftOut += found.length - images.length;
  for (const { file, name } of images) {
    const element = $("row").content.cloneNode(true).firstElementChild;
    const row = { name, file, state: "waiting", caption: "", confidence: null, edited: null, error: null, element };
    row.score = null;
    element.querySelector("h2").textContent = name;
    const text = element.querySelector("textarea");
    text.setAttribute("aria-label", `Caption of ${name}`);
    text.addEventListener("input", () => {
      row.edited = text.value;
      render(row);
    });
    element.querySelector(".guess").addEventListener("click", () => {
      row.edited = row.caption;
      render(row);
      text.focus();
    });
    element.querySelector(".copy").addEventListener("click", () => copy(textOf(row)));
    element.querySelector(".copy-alt").addEventListener("click", () => copy(altAttribute(textOf(row))));
    rows.push(row);
    $("rows").append(element);
  }
  renderStatus();
  run();
}

function showThumbnail(row, { thumbnail, width, height }) {
  const source = { src: URL.createObjectURL(thumbnail), alt: row.name, width, height };
  Object.assign(row.element.querySelector("img"), source);
}

function render(row) {
  const { element, state, confidence, edited } = row;
  const [image, text, line] = ["img", "textarea", ".state"].map((selector) => element.querySelector(selector));
  const percent = confidence === null ? "" : `${Math.round(confidence * 100)} %`;
  element.setAttribute("aria-busy", state === "running");
  if (state === "running") line.textContent = "Captioning ...";
  if (state === "failed") {
    text.value = "";
    line.textContent = `Failed: ${row.error}`;
  }
  if (state === "done") {
    const unsure = isUnsure(row) && edited === null;
    text.readOnly = false;
    if (text.value !== textOf(row)) text.value = textOf(row);
    text.placeholder = unsure ? "Not sure" : "";
    image.alt = textOf(row) || row.name;
    const words = unsure ? "Not sure" : edited === null ? "Confidence" : "Edited; confidence of the model's own caption";
    const parts = percent ? [`${words}: ${percent}`] : [];
    if (row.score !== null) parts.push(`Similarity: ${row.score.toFixed(3)}`);
    line.textContent = parts.join("; ");
    element.querySelector(".guess").hidden = !unsure;
    for (const name of [".copy", ".copy-alt"]) element.querySelector(name).disabled = !textOf(row);
  }
  renderStatus();
}

function renderStatus() {
  const count = (state) => rows.filter((row) => row.state === state).length;
  const [waiting, running, failed] = ["waiting", "running", "failed"].map(count);
  const finished = rows.length - waiting - running;
  const parts = [`${finished} of ${rows.length} photos captioned`];
  if (rows.length === 0) parts[0] = modelState ? "No photos yet" : "Ready";
  if (modelState) parts.push(modelState);
  if (failed) parts[0] = `${finished - failed} of ${rows.length} photos captioned, ${failed} failed`;
  if (leftOut) parts.push(`${leftOut} files left out: not images`);
  if (stopped && waiting) parts.push("stopped");
  $("status").textContent = `${parts.join("; ")}.`;
  $("progress").hidden = rows.length < 2;
  $("progress").value = rows.length ? finished / rows.length : 0;
  $("stop").hidden = waiting === 0;
  $("stop").textContent = stopped ? "Continue" : "Stop";
  for (const id of ["csv", "json", "clear"]) $(id).disabled = rows.length === 0;
}

/** Sorts the list by similarity to the words searched for, or, without any, as the photos came. */
async function sortRows() {
  const query = $("query").value.trim();
  const found = query ? rows.filter(({ embedding }) => embedding) : [];
  const scores = new Map();
  let message = query && "No photos to search yet.";
  if (query) $("found").textContent ||= "Searching ...";
  try {
    if (found.length > 0) {
      (await similarities(query.toLowerCase(), found)).forEach((score, index) => scores.set(found[index], score));
      message = `${found.length} photo${found.length > 1 ? "s" : ""}, most similar to “${query}” first.`;
    }
  } catch (error) {
    message = `The search failed: ${error.message}`;
  }
  // The words have changed meanwhile: a later call sorts.
  if (query !== $("query").value.trim()) return;
  for (const row of rows) row.score = scores.get(row) ?? null;
  const order = rows.toSorted((a, b) => (b.score ?? -2) - (a.score ?? -2));
  // What is in its place isn't moved, so that a caption being edited keeps the focus.
  order.forEach(({ element }, place) => {
    if ($("rows").children[place] !== element) $("rows").insertBefore(element, $("rows").children[place]);
  });
  rows.forEach(render);
  $("found").textContent = message;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    $("status").textContent = `Copied: ${text}`;
  } catch {
    $("status").textContent = "The browser doesn't allow copying here; select the text instead.";
  }
}

function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  // The download reads it after this function has returned.
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

function results() {
  return rows.map((row) => ({
    ...{ file: row.name, caption: textOf(row), confidence: row.confidence },
    ...{ edited: row.edited !== null, error: row.error },
  }));
}

// --- the controls ---------------------------------------------------------------------------------------------------

for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", ({ target }) => {
    add(listed(target.files));
    // So that the same files can be chosen again.
    target.value = "";
  });
}
$("camera").addEventListener("click", () =>
  openCamera($("camera-dialog"), add).catch(({ message }) => {
    $("status").textContent = `No camera: ${message}`;
  }),
);
document.addEventListener("paste", ({ clipboardData }) => add(listed(clipboardData.files)));
document.addEventListener("dragover", (event) => {
  // Dropped text goes where it always does.
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("add").classList.add("over");
});
document.addEventListener("dragleave", () => $("add").classList.remove("over"));
document.addEventListener("drop", async (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("add").classList.remove("over");
  add(await dropped(event.dataTransfer));
});
$("stop").addEventListener("click", () => {
  stopped = !stopped;
  renderStatus();
  run();
});
$("clear").addEventListener("click", () => {
  for (const { element } of rows) URL.revokeObjectURL(element.querySelector("img").src);
  // A caption that is being made finishes; its row is gone.
  $("rows").replaceChildren();
  [rows, leftOut, stopped] = [[], 0, false];
  renderStatus();
  sortRows();
});
let typing;
$("query").addEventListener("input", () => {
  clearTimeout(typing);
  // Screen readers are told of the result, not of every letter.
  typing = setTimeout(sortRows, 300);
});
$("threshold").addEventListener("input", ({ target }) => {
  $("threshold-value").value = `${target.value} %`;
  rows.forEach(render);
});
$("csv").addEventListener("click", () => download("captions.csv", "text/csv", toCsv(results())));
$("json").addEventListener("click", () => download("captions.json", "application/json", toJson(results())));

// --- start ----------------------------------------------------------------------------------------------------------

/** Waits until the service worker has stored all files, or can't: the worker then loads from there. */
async function storeFiles() {
  if (!("serviceWorker" in navigator)) return;
  const options = { updateViaCache: "none" };
  const registration = await navigator.serviceWorker.register("service_worker.js", options);
  const installing = registration.active ? null : registration.installing ?? registration.waiting;
  if (!installing) return;
  const ends = ["activated", "redundant"];
  while (!ends.includes(installing.state)) {
    await new Promise((resolve) => installing.addEventListener("statechange", resolve, { once: true }));
  }
}

function showSettings({ numBeams, calibrated, findsByWords }) {
  for (const beams of new Set([numBeams, 1])) {
    $("beams").append(new Option(beams === 1 ? "fast (greedy)" : `careful (${beams} beams)`, beams));
  }
  $("beams-label").hidden = false;
  $("threshold-label").hidden = !calibrated;
  $("search").hidden = !findsByWords;
  modelState = "";
  renderStatus();
}

// Photos can be added before it is loaded.
let model = storeFiles()
  .catch(() => {})
  .then(startWorker)
  .then(showSettings);
model.catch(({ message }) => {
  modelState = `the model can't be loaded: ${message}`;
  renderStatus();
});
