// From a picture to its faces and their expressions: in the browser what timm_lfnsb/predict does in Python, but for
// pictures that lie or stand on their heads, and the third search for tiny faces.
// Nothing here touches the page, and nothing is sent anywhere.

const LONGEST_SIDE = 4096; // larger pictures are shrunk first: some phones have no larger canvas

/** The context of a new canvas that is quick to read back. */
function newContext(width, height) {
  const context = Object.assign(document.createElement('canvas'), { width, height })
    .getContext('2d', { willReadFrequently: true });
  if (!context) throw new Error('the browser has no memory left for it');
  context.imageSmoothingQuality = 'high';
  return context;
}

/** A canvas with a picture or video frame, shrunk to `longest` pixels; transparent pixels lie on white. */
export function copyPicture(source, width, height, longest = LONGEST_SIDE) {
  const scale = Math.min(1, longest / Math.max(width, height));
  const context = newContext(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  context.fillStyle = 'white';
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  context.drawImage(source, 0, 0, context.canvas.width, context.canvas.height);
  return context.canvas;
}

/** A canvas with the picture of a file, upright; throws where the browser cannot read it. */
export async function readPicture(file) {
  const bitmap = await createImageBitmap(file);
  const canvas = copyPicture(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  return canvas;
}

async function fetchFile(url, integrity = '') {
  const response = await fetch(url, { integrity });
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response;
}

/** The detector and the classifier. `config` is what the Python package wrote into config.json. */
export class Recognizer {
  static async load() {
    const recognizer = new Recognizer();
    recognizer.config = await (await fetchFile('config.json')).json();
    const [script, wasm] = await Promise.all(recognizer.config.runtime.map(
      async ({ url, integrity }) => (await fetchFile(url, integrity)).arrayBuffer()));
    // Not imported by its own address, for which most browsers do not check the integrity.
    const ort = await import(URL.createObjectURL(new Blob([script], { type: 'text/javascript' })));
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
    recognizer.Tensor = ort.Tensor;
    recognizer.detector = await ort.InferenceSession.create('detector.onnx');
    recognizer.classifier = await ort.InferenceSession.create('classifier.onnx');
    return recognizer;
  }

  /** `detect`'s faces with their `probabilities` and `label`, and the milliseconds that both steps took. */
  async recognize(canvas) {
    const start = performance.now();
    const faces = await this.detect(canvas);
    const middle = performance.now();
    for (const face of faces) {
      face.probabilities = await this.classify(cropUpright(canvas, face, this.config.template));
      face.label = this.config.label_names[face.probabilities.indexOf(Math.max(...face.probabilities))];
    }
    return { faces, detectTime: middle - start, nameTime: performance.now() - middle };
  }

  /** The probabilities of a face crop, ImageData of any square size. */
  async classify(crop) {
    const { probabilities } = await this.classifier.run({ pixels: this.#tensor(crop) });
    return [...probabilities.data];
  }

  /** The upright faces of a canvas, largest first: `box` [x, y, width, height], five `points` [x, y], `score`. */
  async detect(canvas) {
    const [least, most] = this.config.detector.sides; // the first two: faces that fill a large input are not seen, nor tiny ones
    const small = copyPicture(canvas, canvas.width, canvas.height, most);
    const longest = Math.max(small.width, small.height);
    const found = [];
    for (const side of new Set([least, Math.max(least, longest)])) {
      const [width, height] = [small.width, small.height].map((n) => Math.max(1, Math.round((n * side) / longest)));
      const context = newContext(32 * Math.ceil(width / 32), 32 * Math.ceil(height / 32));
      context.drawImage(small, 0, 0, width, height);
      const input = context.getImageData(0, 0, context.canvas.width, context.canvas.height);
      const outputs = await this.detector.run({ pixels: this.#tensor(input) });
      found.push(...decode(
        outputs, input.width, this.config.detector.min_score, canvas.width / width, canvas.height / height));
    }
    const kept = [];
    for (const face of found.sort((a, b) => b.score - a.score)) {
      const [x, y, width, height] = face.box;
      const inside = x < canvas.width && y < canvas.height && x + width > 0 && y + height > 0;
      if (inside && !kept.some((other) => sameFace(face.box, other.box))) kept.push(face);
    }
    return kept.sort((a, b) => b.box[2] * b.box[3] - a.box[2] * a.box[3]);
  }

  #tensor({ data, width, height }) {
    return new this.Tensor('uint8', new Uint8Array(data.buffer), [height, width, 4]);
  }
}

/** YuNet's outputs for an input of a width as faces, their pixels times a scale in x and one in y. */
function decode(outputs, inputWidth, minScore, scaleX, scaleY) {
  return [8, 16, 32].flatMap((stride) => {
    const [cls, obj, bbox, kps] = ['cls', 'obj', 'bbox', 'kps'].map((name) => outputs[`${name}_${stride}`].data);
    const columns = inputWidth / stride;
    const score = (i) => Math.sqrt(cls[i] * obj[i]);
    return [...cls.keys()].filter((i) => score(i) >= minScore).map((i) => {
      const at = (x, y) => [((i % columns) + x) * stride * scaleX, (Math.floor(i / columns) + y) * stride * scaleY];
      const [x, y] = at(bbox[4 * i], bbox[4 * i + 1]);
      const width = scaleX * stride * Math.exp(bbox[4 * i + 2]);
      const height = scaleY * stride * Math.exp(bbox[4 * i + 3]);
      const points = [0, 2, 4, 6, 8].map((k) => at(kps[10 * i + k], kps[10 * i + k + 1]));
      return { score: score(i), box: [x - width / 2, y - height / 2, width, height], points };
    });
  });
}

/** Whether two boxes overlap by 0.3 of their union, or one lies in the other by 0.6 of the smaller. */
function sameFace([x1, y1, width1, height1], [x2, y2, width2, height2]) {
  const common = Math.max(0, Math.min(x1 + width1, x2 + width2) - Math.max(x1, x2))
    * Math.max(0, Math.min(y1 + height1, y2 + height2) - Math.max(y1, y2));
  const [area1, area2] = [width1 * height1, width2 * height2];
  return common > 0.3 * (area1 + area2 - common) || common > 0.6 * Math.min(area1, area2);
}

/**
 * The square around a face, turned so that its points stand as upright as those of `template`: ImageData at the size
 * that the face has, but for very small and very large ones. Bilinear; beyond the picture its border is repeated.
 */
export function cropUpright(canvas, { box: [x, y, width, height], points }, template) {
  const side = Math.max(width, height);
  const size = Math.min(Math.max(Math.round(side), 48), 1024);
  const [middleX, middleY] = [x + width / 2 - 0.5, y + height / 2 - 0.5];
  // Points as complex numbers: the turn that fits best is the sum of conjugate(point) * target, about their means.
  const mean = (axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length;
  const [meanX, meanY] = [mean(0), mean(1)];
  let [real, imaginary] = [0, 0];
  points.forEach(([px, py], i) => {
    const [tx, ty] = template[i]; // about its mean, as Python wrote it
    real += (px - meanX) * tx + (py - meanY) * ty;
    imaginary += (px - meanX) * ty - (py - meanY) * tx;
  });
  const step = side / size / (Math.hypot(real, imaginary) || 1);
  const [cos, sin] = [real * step, imaginary * step]; // pixels of the picture for a pixel of the crop

  const within = (value, limit) => Math.min(Math.max(value, 0), limit - 1);
  const reach = ((Math.abs(cos) + Math.abs(sin)) * size) / 2 + 2;
  const [left, right] = [-reach, reach].map((offset) => within(Math.round(middleX + offset), canvas.width));
  const [top, bottom] = [-reach, reach].map((offset) => within(Math.round(middleY + offset), canvas.height));
  const [columns, rows] = [right - left + 1, bottom - top + 1];
  const { data } = canvas.getContext('2d').getImageData(left, top, columns, rows);

  const crop = new ImageData(size, size);
  for (let i = 0; i < size * size; i += 1) {
    const [dx, dy] = [(i % size) - (size - 1) / 2, Math.floor(i / size) - (size - 1) / 2];
    const sourceX = within(middleX + cos * dx + sin * dy - left, columns);
    const sourceY = within(middleY - sin * dx + cos * dy - top, rows);
    const [x0, y0] = [Math.floor(sourceX), Math.floor(sourceY)];
    const right4 = x0 + 1 < columns ? 4 : 0; // from a pixel to its neighbours in `data`
    const below = y0 + 1 < rows ? 4 * columns : 0;
    const [fx, fy, at] = [sourceX - x0, sourceY - y0, 4 * (y0 * columns + x0)];
    for (let k = 0; k < 4; k += 1) {
      const upper = data[at + k] * (1 - fx) + data[at + right4 + k] * fx;
      const lower = data[at + below + k] * (1 - fx) + data[at + below + right4 + k] * fx;
      crop.data[4 * i + k] = upper * (1 - fy) + lower * fy;
    }
  }
  return crop;
}
