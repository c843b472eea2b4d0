// Times `pipeline("image-to-text")` of transformers.js: node transformers_js.mjs NPM_FOLDER TOKENS ROUNDS IMAGE MODEL...
// MODEL is an exported folder, whose int8 graphs caption the image in turn with the others', exactly TOKENS tokens each.
// Prints a JSON object: for each folder `load_ms`, and `ms`, the times of all rounds.

import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";

const [npm, tokens, rounds, image, ...folders] = process.argv.slice(2);
const { env, pipeline, RawImage } = createRequire(join(resolve(npm), "index.js"))("@huggingface/transformers");
env.allowRemoteModels = false;

async function timed(run) {
  const start = performance.now();
  return [await run(), performance.now() - start];
}

const options = { dtype: "q8", session_options: { intraOpNumThreads: 1 } };
const length = { max_new_tokens: Number(tokens), min_new_tokens: Number(tokens) };
const photo = await RawImage.read(image);
const results = {};
const captioners = [];
for (const folder of folders) {
  env.localModelPath = dirname(resolve(folder));
  const [captioner, load_ms] = await timed(() => pipeline("image-to-text", basename(folder), options));
  results[folder] = { load_ms, ms: [] };
  captioners.push([folder, captioner]);
}
for (let round = -1; round < Number(rounds); round++) {
  for (const [folder, captioner] of captioners) {
    const [, ms] = await timed(() => captioner(photo, length));
    // The first round warms up.
    if (round >= 0) results[folder].ms.push(ms);
  }
}
console.log(JSON.stringify(results));
