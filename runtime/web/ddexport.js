/** A bundle in a browser: `const pipe = await load(url)`, then `await pipe(["seven"], { n: 8 })`. */
import { graphOf, precisionsOf, readCodebook, readJson, readManifest, scheduleOf } from "./bundle.js";
import { DDError } from "./errors.js";
import { toImageData } from "./images.js";
import { labelIndex } from "./labels.js";
import { gaussianNoise, uniformNumbers } from "./noise.js";
import { sample } from "./sampler.js";
import { openEngine } from "./session.js";
import { generate } from "./teacher.js";

const OPTIONS = ["steps", "seed", "n", "decoder", "firstImage", "onImage", "onProgress", "signal"];

/**
 * Opens a bundle directory at an URL, and the graphs of the fewest steps; others when they are first needed.
 * precision: the manifest's first if undefined. device: "auto" is WebGPU on a real adapter, else WebAssembly.
 * onProgress({ file, loaded, total }): in bytes. Rejects with a DDError.
 *
 * The pipe: pipe(labels, { steps, seed, n, decoder, firstImage, onImage, onProgress, signal }) gives
 * { images, tokens, drawn }: for each image an ImageData, the int32 tokens of the last step, and the record
 * that onImage gets as soon as it is ready: { label, index, image, tokens, noise, uniforms, steps, seconds };
 * steps: [{ role, known, tokens: int32, sequence: float32 (L*Cv), seconds }].
 */
export async function load(url, { precision, device = "auto", decoder = "full", threads, onProgress } = {}) {
  const base = url.endsWith("/") ? url : `${url}/`;
  const manifest = await readManifest(base);
  const { names, aliases = {} } = await readJson(base, manifest.labels.file, manifest.labels);
  const chosen = precision ?? precisionsOf(manifest)[0];
  const engine = await openEngine({ device, precision: chosen, threads });
  const { length, width, split } = manifest.sequence;
  const sessions = new Map();
  let codebook;
  let last = Promise.resolve(); // a session runs one request at a time

  async function open(schedule, decoder, onProgress = () => {}) {
    const graphs = [decoderGraph(decoder)];
    if (schedule.known.length) graphs.unshift(studentGraph(schedule));
    if (schedule.teacher) graphs.push(graphOf(manifest, "teacher", chosen));
    const missing = graphs.filter((graph) => !sessions.has(graph.file));
    const total = missing.flatMap((graph) => graph.files).reduce((sum, info) => sum + info.bytes, 0);
    let loaded = 0;
    for (const graph of missing) {
      onProgress({ file: graph.file, loaded, total });
      const opened = await engine.open(base, graph, (bytes) => {
        loaded += bytes;
        onProgress({ file: graph.file, loaded, total });
      });
      sessions.set(graph.file, opened);
    }
    if (schedule.teacher) codebook ??= await readCodebook(base, manifest);
  }

  const studentGraph = (schedule) => graphOf(manifest, "student", chosen, schedule.split ?? split);
  const decoderGraph = (name) => graphOf(manifest, name === "full" ? "decoder" : `decoder_${name}`, chosen);

  async function decode(sequence, decoder = "full") {
    const feeds = { sequence: engine.tensor("float32", sequence, [1, length, width]) };
    const { image } = await sessions.get(decoderGraph(decoder).file).run(feeds, ["image"]);
    const picture = toImageData(image.data, manifest.image);
    image.dispose();
    return picture;
  }

  async function draw(label, index, seed, schedule, decoder) {
    const noise = gaussianNoise(seed, index, length * width);
    const uniforms = schedule.teacher && uniformNumbers(seed, index, length);
    const student = async (latents, known) => {
      const feeds = {
        latents: engine.tensor("float32", latents, [1, length, width]),
        label: engine.tensor("int64", [label], [1]),
        known: engine.tensor("int64", [known], [1]),
      };
      const outputs = await sessions.get(studentGraph(schedule).file).run(feeds, ["sequence", "tokens"]);
      const tokens = Int32Array.from(outputs.tokens.data, Number);
      return { sequence: outputs.sequence.data.slice(), tokens };
    };
    const { run } = sessions.get(schedule.teacher && graphOf(manifest, "teacher", chosen).file) ?? {};
    const { tensor } = engine;
    const continued = (span, prefix) =>
      generate({ run, tensor, teacher: manifest.teacher, span, prefix, label, uniforms });
    const steps = await sample({ student, generate: continued, codebook, noise, schedule, width });
    const began = performance.now();
    const image = await decode(steps.at(-1).sequence, decoder);
    const seconds = { decoder: (performance.now() - began) / 1000 };
    for (const step of steps) seconds[step.role] = (seconds[step.role] ?? 0) + step.seconds;
    return { label, index, image, tokens: steps.at(-1).tokens, noise, uniforms, steps, seconds };
  }

  async function call(labels, request = {}) {
    const unknown = Object.keys(request).find((name) => !OPTIONS.includes(name));
    if (unknown) throw new DDError("invalid_value", `A pipe takes no option called ${unknown}.`);
    const { steps, seed = 0, n = 1, firstImage = 0, onImage, signal } = request;
    const decoder = request.decoder ?? "full";
    if (!(Number.isInteger(n) && n > 0)) throw new DDError("invalid_value", `n must be 1 or more, not ${n}.`);
    const numbers = [labels].flat().map((label) => labelIndex(names, aliases, label));
    const schedule = scheduleOf(manifest, steps);
    await open(schedule, decoder, request.onProgress);
    const drawn = [];
    for (let i = 0; i < numbers.length * n; i++) {
      signal?.throwIfAborted();
      const label = numbers[Math.floor(i / n)];
      drawn.push(await draw(label, BigInt(firstImage) + BigInt(i), seed, schedule, decoder));
      onImage?.(drawn[i]);
    }
    return { images: drawn.map(({ image }) => image), tokens: drawn.map(({ tokens }) => tokens), drawn };
  }

  const inTurn = (work) => (...given) => {
    const result = last.then(() => work(...given));
    last = result.catch(() => {});
    return result;
  };

  await open(scheduleOf(manifest), decoder, onProgress);
  return Object.assign(inTurn(call), {
    manifest,
    labels: names,
    aliases,
    precision: chosen,
    device: engine.device,
    threads: engine.threads,
    decode: inTurn(decode),
    close: inTurn(async () => {
      for (const session of sessions.values()) await session.release();
      sessions.clear();
    }),
  });
}
