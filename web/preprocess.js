// Images as the model expects them: the image processor's resize, crop and normalization, as in
// tinycap/deploy/image_preprocessing.py. Given the same RGB bytes, the values equal Pillow's to the last bit.

// Larger images are first scaled down by the browser: Pillow's filter needs their pixels in memory.
const MAX_PIXELS = 16e6;
// Pillow's fixed-point precision of filter weights.
const BITS = 22;

/** Decodes a file as the browser shows it: rotated by EXIF, converted to sRGB, first frame, transparency over white. */
export async function readImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (bitmap.width * bitmap.height)));
  const canvas = draw(bitmap, scale);
  bitmap.close();
  return canvas;
}

/** An `OffscreenCanvas` with an image, or another canvas, scaled. */
export function draw(image, scale) {
  const [width, height] = [image.width, image.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  // In main memory: the pixels are read back, and a GPU may round differently.
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  return canvas;
}

/** RGBA `{ data, width, height }` and a preprocessor_config.json -> Float32Array (3, crop height, crop width). */
export function pixelValues({ data, width, height }, config) {
  const { height: rows, width: columns } = config.crop_size;
  const [resizedWidth, resizedHeight] = [width, height].map((side) =>
    Math.trunc((config.size.shortest_edge * side) / Math.min(width, height)),
  );
  // Only what the crop shows is computed.
  const across = filter(width, resizedWidth, Math.floor((resizedWidth - columns) / 2), columns);
  const down = filter(height, resizedHeight, Math.floor((resizedHeight - rows) / 2), rows);
  const first = down[0].start;
  const last = Math.max(...down.map(({ start, weights }) => start + weights.length));
  const narrow = new Uint8ClampedArray((last - first) * columns * 3);
  for (let row = first, to = 0; row < last; row++) {
    for (const { start, weights } of across) {
      for (let channel = 0; channel < 3; channel++, to++) {
        narrow[to] = weigh(data, (row * width + start) * 4 + channel, 4, weights);
      }
    }
  }
  const tables = config.image_mean.map((mean, channel) => lookupTable(config, mean, config.image_std[channel]));
  const values = new Float32Array(3 * rows * columns);
  const pixel = new Uint8ClampedArray(1);
  for (let row = 0, to = 0; row < rows; row++) {
    const { start, weights } = down[row];
    for (let column = 0; column < columns; column++, to++) {
      for (let channel = 0; channel < 3; channel++) {
        pixel[0] = weigh(narrow, ((start - first) * columns + column) * 3 + channel, 3 * columns, weights);
        values[channel * rows * columns + to] = tables[channel][pixel[0]];
      }
    }
  }
  return values;
}

/** Sum of bytes at `from`, `from + stride`, ..., each times its weight, rounded. */
function weigh(bytes, from, stride, weights) {
  let sum = 1 << (BITS - 1);
  for (let index = 0; index < weights.length; index++, from += stride) sum += bytes[from] * weights[index];
  return sum >> BITS;
}

/** The bicubic filter (a = -0.5), widened by the scale when shrinking: for each output position from `first` on, the
 * first input position and the weights of those that follow. */
function filter(inputSize, outputSize, first, count) {
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: count }, (_, index) => {
    const center = (first + index + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - 2 * stretch + 0.5));
    const end = Math.min(inputSize, Math.trunc(center + 2 * stretch + 0.5));
    const weights = Array.from({ length: end - start }, (_, at) => bicubic((at + start - center + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const fixed = weights.map((weight) => (weight / sum) * (1 << BITS));
    return { start, weights: Int32Array.from(fixed, (weight) => Math.trunc(weight + (weight < 0 ? -0.5 : 0.5))) };
  });
}

function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** The normalized value of each byte, rounded to float32 after each operation as in the image processor. */
function lookupTable(config, mean, std) {
  const [center, width] = [Math.fround(mean), Math.fround(std)];
  return Float32Array.from({ length: 256 }, (_, byte) =>
    Math.fround(Math.fround(Math.fround(byte * config.rescale_factor) - center) / width),
  );
}
