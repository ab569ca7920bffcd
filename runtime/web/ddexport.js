/** A bundle in a browser: `const pipe = await load(url)`, then `await pipe(["seven"], { n: 8 })`. */
import { graphOf, precisionsOf, readCodebook, readJson, readManifest, scheduleOf } from "./bundle.js";
import { DDError } from "./errors.js";
import { toImageData } from "./images.js";
import { labelIndex } from "./labels.js";
import { gaussianNoise, uniformNumbers } from "./noise.js";
import { sample } from "./sampler.js";
import { counter, openEngine } from "./session.js";
import { generate } from "./teacher.js";

/**
 * Opens a bundle directory at an URL, and the graphs of the fewest steps; others when first needed.
 * precision: the manifest's first if undefined. device: "auto" is WebGPU on a real adapter, else WebAssembly.
 * onProgress({ file, loaded, total }): in bytes. Rejects with a DDError.
 *
 * pipe(labels, { steps, seed, n, decoder, firstImage, onProgress }) gives { images, tokens, drawn }: of
 * each image an ImageData, the int32 tokens of the last step, and a record
 * { label, index, image, tokens, noise, uniforms, steps, seconds }; steps: of student and teacher in order,
 * [{ role, known, tokens: int32, sequence: float32 (L*Cv), seconds }].
 */
export async function load(url, options = {}) {
  const { precision, device = "auto", decoder = "full", threads, onProgress, ...others } = options;
  refuse(others);
  const base = `${url}`.replace(/\/?$/, "/");
  const manifest = await readManifest(base);
  const { names, aliases = {} } = await readJson(base, manifest.labels);
  const chosen = precision ?? precisionsOf(manifest)[0];
  const engine = await openEngine({ device, precision: chosen, threads, onProgress });
  const { tensor } = engine;
  const { length, width } = manifest.sequence;
  const sessions = new Map(); // by file
  let codebook;
  let last = Promise.resolve(); // a session runs one request at a time

  /** What a schedule needs: { decoder, student, teacher }, each with `run`. */
  async function open(schedule, decoder, onProgress) {
    const role = decoder === "full" ? "decoder" : `decoder_${decoder}`;
    const graphs = { decoder: graphOf(manifest, role, chosen) };
    if (schedule.known.length) graphs.student = graphOf(manifest, "student", chosen, schedule.split);
    if (schedule.teacher) graphs.teacher = graphOf(manifest, "teacher", chosen);
    const missing = Object.values(graphs).filter(({ file }) => !sessions.has(file));
    const total = missing.flatMap(({ files }) => files).reduce((sum, { bytes }) => sum + bytes, 0);
    const arrived = counter("the model", total, onProgress);
    for (const graph of missing) sessions.set(graph.file, await engine.open(base, graph, arrived));
    if (schedule.teacher) codebook ??= await readCodebook(base, manifest);
    return Object.fromEntries(Object.entries(graphs).map(([role, { file }]) => [role, sessions.get(file)]));
  }

  async function decode(sequence, decoder = "full") {
    const opened = await open({ known: [] }, decoder);
    const feeds = { sequence: tensor("float32", sequence, [1, length, width]) };
    const { image } = await opened.decoder.run(feeds, ["image"]);
    const picture = toImageData(image.data, manifest.image);
    image.dispose();
    return picture;
  }

  async function draw(label, index, seed, schedule, opened, decoder) {
    const noise = gaussianNoise(seed, index, length * width);
    const uniforms = schedule.teacher && uniformNumbers(seed, index, length);
    const student = async (latents, known) => {
      const feeds = {
        latents: tensor("float32", latents, [1, length, width]),
        label: tensor("int64", [label], [1]),
        known: tensor("int64", [known], [1]),
      };
      const { sequence, tokens } = await opened.student.run(feeds, ["sequence", "tokens"]);
      return { sequence: sequence.data.slice(), tokens: Int32Array.from(tokens.data, Number) };
    };
    const continued = (span, prefix) => {
      const { run } = opened.teacher;
      return generate({ run, tensor, teacher: manifest.teacher, span, prefix, label, uniforms });
    };
    const steps = await sample({ student, generate: continued, codebook, noise, schedule, width });
    const began = performance.now();
    const image = await decode(steps.at(-1).sequence, decoder);
    const seconds = { decoder: (performance.now() - began) / 1000 };
    for (const step of steps) seconds[step.role] = (seconds[step.role] ?? 0) + step.seconds;
    return { label, index, image, tokens: steps.at(-1).tokens, noise, uniforms, steps, seconds };
  }

  async function call(labels, request = {}) {
    const { steps, seed = 0, n = 1, decoder = "full", firstImage = 0, onProgress, ...others } = request;
    refuse(others);
    if (!(Number.isInteger(n) && n > 0)) throw new DDError("invalid_value", `n must be 1 or more, not ${n}.`);
    if (!Number.isSafeInteger(firstImage) && typeof firstImage !== "bigint") {
      throw new DDError("invalid_value", `firstImage must be an integer, not ${firstImage}.`);
    }
    const numbers = [labels].flat().map((label) => labelIndex(names, aliases, label));
    if (!numbers.length) throw new DDError("unknown_label", "No label is given.");
    const schedule = scheduleOf(manifest, steps);
    const opened = await open(schedule, decoder, onProgress);
    const drawn = [];
    for (const label of numbers.flatMap((number) => Array(n).fill(number))) {
      await new Promise(setTimeout); // in WebAssembly all else is microtasks: the page could not even paint
      const index = BigInt(firstImage) + BigInt(drawn.length);
      drawn.push(await draw(label, index, seed, schedule, opened, decoder));
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

function refuse(others) {
  const [unknown] = Object.keys(others);
  if (unknown) throw new DDError("invalid_value", `There is no option ${unknown}.`);
}
