// Runs the page's modules under Node: node browser_modules.mjs WEB_FOLDER TASK, with a JSON object on standard input.

import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, task] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(join(resolve(folder), name)));
const input = JSON.parse(readFileSync(0, "utf-8"));

/** Logits that depend on all tokens of a beam, so that a beam in the wrong row changes them. */
function tableStep(table) {
  let histories = [];
  return async (tokens, parents) => {
    histories = tokens.map((token, row) => [...(parents ? histories[parents[row]] : []), token]);
    return histories.map((tokens) => {
      const place = tokens.reduce((sum, token, index) => sum + token * (index + 1), 0);
      return Float32Array.from(table[place % table.length]);
    });
  };
}

const tasks = {
  async pixels({ rgba, width, height, config }) {
    const { pixelValues } = await load("preprocess.js");
    return Array.from(pixelValues({ data: Buffer.from(rgba, "base64"), width, height }, config));
  },
  async search({ table, settings }) {
    const { beamSearch } = await load("beam_search.js");
    return beamSearch(tableStep(table), settings, () => {});
  },
  async rows({ results, caption }) {
    const { altAttribute, toCsv, toJson } = await load("rows.js");
    return { alt: altAttribute(caption), csv: toCsv(results), json: toJson(results) };
  },
};
console.log(JSON.stringify(await Promise.all(input.map((each) => tasks[task](each)))));
