// The worker that captions images. It is sent `{ file, numBeams }` and answers with any number of `{ partial }`, with
// `{ thumbnail }`, and with `{ caption, confidence, embedding }` or `{ error }`; at the start with `{ ready }` or
// `{ fatal }`. Sent `{ query, embeddings }` with a port, it answers there with `{ scores }` or `{ error }`.

import { InferenceSession, Tensor, env } from "./vendor/ort.js";
import { Tokenizer } from "./vendor/tokenizers.js";
import { draw, pixelValues, readImage } from "./preprocess.js";
import { beamSearch } from "./beam_search.js";

const THUMBNAIL_SIDE = 192;

async function read(name, kind = "json") {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`model/${name}: expected a file, got status ${response.status}`);
  return response[kind]();
}

async function loadGraph(name) {
  const bytes = new Uint8Array(await read(`onnx/${name}_quantized.onnx`, "arrayBuffer"));
  return InferenceSession.create(bytes, { executionProviders: ["wasm"] });
}

async function load() {
  env.wasm.wasmPaths = { wasm: new URL("vendor/ort.wasm", self.location.href).href };
  const names = ["config", "generation_config", "preprocessor_config", "tokenizer", "tokenizer_config"];
  const [config, generation, preprocessor, ...tokenizer] = await Promise.all(names.map((name) => read(`${name}.json`)));
  // Optional: without it there is no confidence.
  const { calibrations } = await read("confidence.json").catch(() => ({ calibrations: [] }));
  const [encoder, decoder] = await Promise.all(["encoder_model", "decoder_model_merged"].map(loadGraph));
  return { config, generation, preprocessor, tokenizer: new Tokenizer(...tokenizer), calibrations, encoder, decoder };
}

/** A `step` of the search for one encoded image, with its cache of keys and values. */
function decodingStep({ config, decoder }, states) {
  const { decoder_attention_heads: heads, d_model: width } = config.decoder;
  const past = decoder.inputNames.filter((name) => name.startsWith("past_key_values"));
  const cache = Object.fromEntries(
    past.map((name) => [name, new Tensor("float32", new Float32Array(0), [1, heads, 0, width / heads])]),
  );
  return async (tokens, parents) => {
    if (parents) for (const name of past) cache[name] = takeRows(cache[name], parents);
    const outputs = await decoder.run({
      input_ids: new Tensor("int64", BigInt64Array.from(tokens, BigInt), [tokens.length, 1]),
      encoder_hidden_states: takeRows(states, Array(tokens.length).fill(0)),
      ...cache,
    });
    for (const name of past) cache[name] = outputs[name.replace("past_key_values", "present")];
    const { data } = outputs.logits;
    const size = data.length / tokens.length;
    return tokens.map((_, row) => data.subarray(row * size, (row + 1) * size));
  };
}

function takeRows(tensor, rows) {
  if (rows.length === tensor.dims[0] && rows.every((row, index) => row === index)) return tensor;
  const size = tensor.data.length / tensor.dims[0];
  const data = new Float32Array(rows.length * size);
  rows.forEach((row, index) => data.set(tensor.data.subarray(row * size, (row + 1) * size), index * size));
  return new Tensor("float32", data, [rows.length, ...tensor.dims.slice(1)]);
}

/** Arguments of the search from generation_config.json, as in `OnnxCaptioner`. */
function searchSettings({ config, generation }, numBeams) {
  const settings = { ...config, ...generation };
  const limit = settings.max_new_tokens || (settings.max_length || 20) - 1;
  return {
    start: settings.decoder_start_token_id,
    eos: [settings.eos_token_id ?? []].flat(),
    limit: Math.max(1, Math.min(limit, config.decoder.max_position_embeddings - 1)),
    suppress: settings.suppress_tokens ?? [],
    lengthPenalty: settings.length_penalty ?? 1,
    earlyStopping: settings.early_stopping ?? false,
    numBeams,
  };
}

/** The probability that a caption is right: see confidence_tinycap.py. `null` without a calibration. */
function confidence(calibrations, { tokens, logProb }, numBeams) {
  const distance = (entry) => Math.abs(entry.num_beams - numBeams);
  const [entry] = calibrations.toSorted((a, b) => distance(a) - distance(b) || a.num_beams - b.num_beams);
  if (!entry) return null;
  const { mean_log_prob, num_tokens } = entry.coefficients;
  const logit = entry.intercept + (mean_log_prob * logProb) / tokens.length + num_tokens * tokens.length;
  return 1 / (1 + Math.exp(-logit));
}

async function caption(model, file, numBeams) {
  const canvas = await readImage(file).catch(() => {
    throw new Error("not an image that this browser can read");
  });
  const { width, height } = canvas;
  const small = draw(canvas, Math.min(1, THUMBNAIL_SIDE / Math.max(width, height)));
  self.postMessage({ thumbnail: await small.convertToBlob({ type: "image/jpeg" }), width, height });
  const pixels = pixelValues(canvas.getContext("2d").getImageData(0, 0, width, height), model.preprocessor);
  const { height: rows, width: columns } = model.preprocessor.crop_size;
  const pixel_values = new Tensor("float32", pixels, [1, 3, rows, columns]);
  const { last_hidden_state, image_embeds } = await model.encoder.run({ pixel_values });
  const settings = searchSettings(model, numBeams);
  const decode = (tokens) =>
    model.tokenizer.decode([settings.start, ...tokens], { skip_special_tokens: true }).trim();
  const report = (tokens) => self.postMessage({ partial: decode(tokens) });
  const found = await beamSearch(decodingStep(model, last_hidden_state), settings, report);
  return {
    caption: decode(found.tokens),
    confidence: confidence(model.calibrations, found, numBeams),
    embedding: image_embeds.data,
  };
}

/** Cosines of a query and images of these embeddings, as in `tinycap search`. */
async function similarities(model, query, embeddings) {
  // At the first query, so that the first caption doesn't wait for it; tried again after a failure.
  model.text ??= loadGraph("text_model").catch((error) => {
    model.text = undefined;
    throw error;
  });
  const ids = model.tokenizer.encode(query).ids.slice(0, model.config.text_encoder_config.max_position_embeddings);
  const [input_ids, attention_mask] = [ids, ids.map(() => 1)].map(
    (row) => new Tensor("int64", BigInt64Array.from(row, BigInt), [1, row.length]),
  );
  const { data: text } = (await (await model.text).run({ input_ids, attention_mask })).text_embeds;
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const cosine = (image) => dot(text, image) / Math.sqrt(dot(image, image));
  if (embeddings.every(({ length }) => length === text.length)) return embeddings.map(cosine);
  // CLIP's projection of images, (texts' width, images' width): a header, whose length is at its start, and float32.
  model.projection ??= await read("onnx/visual_projection.npy", "arrayBuffer");
  const weights = new Float32Array(model.projection, 10 + new DataView(model.projection).getUint16(8, true));
  const project = (image) => text.map((_, row) => dot(image, weights.subarray(row * image.length)));
  return embeddings.map((image) => cosine(project(image)));
}

const loaded = load();
loaded.then(
  ({ config, generation, calibrations }) =>
    self.postMessage({
      ready: {
        numBeams: generation.num_beams ?? 1,
        calibrated: calibrations.length > 0,
        findsByWords: config.text_encoder_config !== undefined,
      },
    }),
  (error) => self.postMessage({ fatal: error.message }),
);
self.onmessage = async ({ data: { file, numBeams, query, embeddings }, ports: [port] }) => {
  const answer = async (model) =>
    port ? { scores: await similarities(model, query, embeddings) } : caption(model, file, numBeams);
  (port ?? self).postMessage(await loaded.then(answer).catch(({ message }) => ({ error: message })));
};
