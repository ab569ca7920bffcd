/** The manifest bundle.json and the files it names, fetched and compared with its hashes: docs/bundle.md. */
import { DDError } from "./errors.js";

const SCHEMA = 2;
const DAMAGED = "The copy is damaged or incomplete: make the site again.";

/** Where a file lies: in the page itself (a page in one file has them as blobs), or beside it. */
export function address(path) {
  return globalThis.embedded?.[path] ?? new URL(path, self.location.href).href;
}

/** The manifest of a bundle at `base`, which ends in a slash. */
export async function readManifest(base) {
  const manifest = await readJson(base, { file: "bundle.json" });
  if (manifest?.schema !== SCHEMA) {
    const message = `The bundle has schema ${manifest?.schema}, and this page reads ${SCHEMA}.`;
    throw manifest?.schema > SCHEMA
      ? new DDError("newer_schema", message, "Make the site with a newer ddexport.")
      : new DDError("older_schema", message, "Export the bundle again.");
  }
  if (manifest.text) {
    const message = `${manifest.name} draws from sentences, which a browser cannot read yet.`;
    throw new DDError("text_model", message, "Use ddexport serve.");
  }
  return manifest;
}

/** The precisions that have a student and a decoder, in the manifest's order. */
export function precisionsOf(manifest) {
  const listed = (role) => manifest.graphs.filter((graph) => graph.role === role).map((g) => g.precision);
  return [...new Set(listed("student"))].filter((precision) => listed("decoder").includes(precision));
}

/** The graph of a role, of the student with that split. An int8 bundle has a teacher in another precision. */
export function graphOf(manifest, role, precision, split = manifest.sequence.split) {
  const wanted = split === manifest.sequence.split ? undefined : split;
  const graphs = manifest.graphs.filter((graph) => graph.role === role && graph.split === wanted);
  const computed = (name) => graphs.find((graph) => graph.precision === name);
  const graph = computed(precision) ?? (role === "teacher" ? computed("fp32") ?? graphs[0] : undefined);
  if (graph) return graph;
  const precisions = precisionsOf(manifest);
  const code = precisions.includes(precision) ? "no_decoder" : "no_precision";
  throw new DDError(code, `${manifest.name} has no ${role.replace("_", " ")} in ${precision}.`,
    `It has: ${precisions.join(", ")}; decoders ${decodersOf(manifest).join(", ")}.`);
}

/** The names of the decoders. */
export const decodersOf = (manifest) => ["full", ...Object.keys(manifest.decoders ?? {})];

/** The schedules, shortest first, the teacher's own last: { steps, known, teacher, split, passes }. */
export function schedulesOf({ schedules, teacher, sequence }) {
  const listed = Object.entries(schedules).map(([steps, one]) => ({ ...one, steps: Number(steps) }));
  if (teacher) listed.push({ steps: "teacher", known: [], teacher: { start: 0, end: sequence.length } });
  return listed.map((schedule) => {
    const { start, end } = schedule.teacher ?? { start: 0, end: 0 };
    const starts = teacher?.starts.filter((position) => position >= start && position < end) ?? [];
    return { ...schedule, passes: schedule.known.length + starts.length };
  });
}

/** The schedule of so many steps, the shortest if undefined. */
export function scheduleOf(manifest, steps) {
  const schedules = schedulesOf(manifest);
  const schedule = steps === undefined ? schedules[0] : schedules.find((one) => one.steps === steps);
  if (schedule) return schedule;
  throw new DDError("unknown_steps", `${manifest.name} has no schedule of ${steps} steps.`,
    `It has: ${schedules.map((one) => one.steps).join(", ")}.`);
}

/** A JSON file of the bundle. */
export async function readJson(base, info) {
  const bytes = await readFile(base, info);
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new DDError("damaged", `${info.file} is not JSON.`, DAMAGED);
  }
}

/**
 * The bytes of a file by its entry in the manifest, whose size and hash it must have; bundle.json has none.
 * onBytes: told how many arrived, chunk by chunk.
 */
export async function readFile(base, { file, bytes: size, sha256 }, onBytes = () => {}) {
  if (/^\/|\\|:|(^|\/)\.\.(\/|$)/.test(file)) {
    throw new DDError("damaged", `bundle.json names a path outside the bundle: ${file}.`, "Do not trust it.");
  }
  const broken = (error) => {
    const hint = "Check the connection, then try again.";
    throw new DDError("network", `${file} cannot be fetched: ${error.message}.`, hint);
  };
  const response = await fetch(address(base + file)).catch(broken);
  if (!response.ok) {
    throw new DDError("not_found", `${file} cannot be fetched: the server says ${response.status}.`, DAMAGED);
  }
  if (size === undefined) return new Uint8Array(await response.arrayBuffer().catch(broken));
  const bytes = new Uint8Array(size); // filled in place: twice the size would be too much for a phone
  const reader = response.body.getReader();
  let filled = 0;
  for (;;) {
    const { done, value } = await reader.read().catch(broken);
    if (done) break;
    if (filled + value.length <= size) bytes.set(value, filled);
    filled += value.length;
    onBytes(value.length);
  }
  if (filled !== size) {
    throw new DDError("wrong_size", `${file} has ${filled} bytes, but bundle.json says ${size}.`, DAMAGED);
  }
  // Without a secure context (plain HTTP from another machine) browsers have no SHA-256: the size must do.
  if (!crypto.subtle) return bytes;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex === sha256) return bytes;
  throw new DDError("wrong_hash", `The SHA-256 of ${file} is not the one in bundle.json.`, DAMAGED);
}

/** The codebook of a bundle with a teacher: float32 (V*Cv), the end of an npy file. */
export async function readCodebook(base, { teacher, sequence }) {
  const bytes = await readFile(base, teacher.codebook);
  return new Float32Array(bytes.slice(-4 * sequence.codebook * sequence.width).buffer);
}
