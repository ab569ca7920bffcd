/** The manifest bundle.json and the files it names, fetched and compared with its hashes: docs/bundle.md. */
import { DDError } from "./errors.js";

const SCHEMA = 2;
const FLOAT32 = "fp32";
const AGAIN = "Check the connection, then try again.";
const DAMAGED = "The copy is damaged or incomplete: make the site again.";

/** Where a file lies: in the page itself (a page in one file has them as blobs), or beside it. */
export function address(path) {
  return globalThis.embedded?.[path] ?? new URL(path, self.location.href).href;
}

/** The manifest of a bundle at `base`, which ends in a slash. */
export async function readManifest(base) {
  const manifest = await readJson(base, "bundle.json");
  if (manifest?.schema !== SCHEMA) {
    const newer = manifest?.schema > SCHEMA;
    throw new DDError(
      newer ? "newer_schema" : "older_schema",
      `The bundle has schema ${manifest?.schema}, and this page reads ${SCHEMA}.`,
      newer ? "Make the site with a newer ddexport." : "Export the bundle again.",
    );
  }
  if (manifest.text) {
    throw new DDError("text_model", `${manifest.name} draws from sentences, which a browser cannot read yet.`,
      "Use ddexport serve.");
  }
  return manifest;
}

/** The precisions that have a student and a decoder, in the manifest's order. */
export function precisionsOf(manifest) {
  const has = (role, precision) => manifest.graphs.some((g) => g.role === role && g.precision === precision);
  const listed = [...new Set(manifest.graphs.map((graph) => graph.precision))];
  return listed.filter((precision) => has("student", precision) && has("decoder", precision));
}

/** The graph of a role, of the student with that split. A teacher in another precision is float32. */
export function graphOf(manifest, role, precision, split) {
  const wanted = role === "student" && split !== manifest.sequence.split ? split : undefined;
  const fits = (graph, want) => graph.role === role && graph.precision === want && graph.split === wanted;
  const graph = manifest.graphs.find((candidate) => fits(candidate, precision))
    ?? (role === "teacher" ? manifest.graphs.find((candidate) => fits(candidate, FLOAT32)) : undefined);
  if (graph) return graph;
  const precisions = precisionsOf(manifest);
  throw new DDError(precisions.includes(precision) ? "no_decoder" : "no_precision",
    `${manifest.name} has no ${role.replace("_", " ")} in ${precision}.`,
    `It has: ${precisions.join(", ")}; decoders ${["full", ...Object.keys(manifest.decoders ?? {})].join(", ")}.`);
}

/** The numbers of steps of the schedules, and "teacher" where there is one. */
export function stepsOf(manifest) {
  return [...Object.keys(manifest.schedules).map(Number), ...(manifest.teacher ? ["teacher"] : [])];
}

/** The schedule of so many steps, the shortest if undefined, all by the teacher for "teacher". */
export function scheduleOf(manifest, steps = stepsOf(manifest)[0]) {
  if (!stepsOf(manifest).includes(steps)) {
    throw new DDError("unknown_steps", `${manifest.name} has no schedule of ${steps} steps.`,
      `It has: ${stepsOf(manifest).join(", ")}.`);
  }
  const whole = { known: [], teacher: { start: 0, end: manifest.sequence.length } };
  return steps === "teacher" ? whole : manifest.schedules[steps];
}

/** Student steps and the teacher's steps together. */
export function passesOf(manifest, schedule) {
  const { start, end } = schedule.teacher ?? { start: 0, end: 0 };
  const inside = manifest.teacher?.starts.filter((s) => s >= start && s < end) ?? [];
  return schedule.known.length + inside.length;
}

/** A JSON file of the bundle; info: its entry in the manifest, whose size and hash it must have. */
export async function readJson(base, file, info) {
  const bytes = info ? await readFile(base, info) : await download(base, file);
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new DDError("damaged", `${file} is not JSON.`, DAMAGED);
  }
}

/** The bytes of a file that the manifest describes. onBytes: told how many arrived, chunk by chunk. */
export async function readFile(base, info, onBytes) {
  if (/^\/|\\|:|(^|\/)\.\.(\/|$)/.test(info.file)) {
    throw new DDError("damaged", `bundle.json names a path outside the bundle: ${info.file}.`,
      "Do not trust it.");
  }
  const bytes = await download(base, info.file, info.bytes, onBytes);
  // Without a secure context (plain HTTP from another machine) browsers have no SHA-256: the size must do.
  if (!crypto.subtle) return bytes;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== info.sha256) {
    throw new DDError("wrong_hash", `The SHA-256 of ${info.file} is not the one in bundle.json.`, DAMAGED);
  }
  return bytes;
}

async function download(base, file, size, onBytes = () => {}) {
  let response;
  try {
    response = await fetch(address(base + file));
  } catch (error) {
    throw new DDError("network", `${file} cannot be fetched: ${error.message}.`, AGAIN);
  }
  if (!response.ok) {
    throw new DDError("not_found", `${file} cannot be fetched: the server says ${response.status}.`, DAMAGED);
  }
  if (size === undefined) return new Uint8Array(await response.arrayBuffer());
  const bytes = new Uint8Array(size); // filled in place: twice the size would be too much for a phone
  let filled = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw new DDError("network", `${file} broke off: ${error.message}.`, AGAIN);
    });
    if (done) break;
    if (filled + value.length <= size) bytes.set(value, filled);
    filled += value.length;
    onBytes(value.length);
  }
  if (filled === size) return bytes;
  throw new DDError("wrong_size", `${file} has ${filled} bytes, but bundle.json says ${size}.`, DAMAGED);
}

/** The codebook of a bundle with a teacher: float32 (V, Cv), from an npy file of version 1. */
export async function readCodebook(base, manifest) {
  const bytes = await readFile(base, manifest.teacher.codebook);
  const start = 10 + new DataView(bytes.buffer).getUint16(8, true);
  const header = new TextDecoder().decode(bytes.subarray(10, start));
  const { codebook, width } = manifest.sequence;
  const facts = ["'<f4'", "'fortran_order': False", `(${codebook}, ${width})`];
  if (!facts.every((fact) => header.includes(fact)) || bytes.length !== start + 4 * codebook * width) {
    throw new DDError("damaged", `The codebook is not float32 of ${codebook} x ${width}.`, DAMAGED);
  }
  return new Float32Array(bytes.slice(start).buffer);
}
