// Captions images with transformers.js: node transformers_js.mjs NPM_FOLDER EXPORTED_FOLDER IMAGE...
// NPM_FOLDER has node_modules/@huggingface/transformers. Prints a JSON object: for each precision the captions.

import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";

const [npm, exported, ...images] = process.argv.slice(2);
const { env, pipeline } = createRequire(join(resolve(npm), "index.js"))("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(exported));

const captions = {};
for (const dtype of ["fp32", "q8"]) {
  const captioner = await pipeline("image-to-text", basename(exported), { dtype, session_options: { intraOpNumThreads: 1 } });
  captions[dtype] = [];
  for (const image of images) captions[dtype].push((await captioner(image))[0].generated_text);
}
console.log(JSON.stringify(captions));
