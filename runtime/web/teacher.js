/** The auto-regressive teacher of one image, as runtime/teacher.py; docs/teacher.md has the rules in words. */
import { DDError } from "./errors.js";

/**
 * The tokens int32 (end) of a span behind a prefix (start). teacher: of the manifest. uniforms: float64 (L).
 * run(feeds, names): the graph, from tensors to tensors by name.
 */
export async function generate({ run, tensor, teacher, span, prefix, label, uniforms }) {
  const length = teacher.starts.at(-1);
  const tokens = new Int32Array(length);
  tokens.set(prefix);
  const names = Array.from({ length: teacher.layers }, (_, i) => [`key_${i}`, `value_${i}`]).flat();
  const shape = [2, 1, teacher.heads, span.end, teacher.head_width];
  const rows = 2 * teacher.heads;
  const size = rows * span.end * teacher.head_width;
  const cache = Object.fromEntries(names.map((name) => [name, new Float32Array(size)]));
  let filled = 0;
  const starts = teacher.starts.filter((start) => start >= span.start && start <= span.end);
  for (let i = 0; i + 1 < starts.length; i++) {
    const [start, end] = [starts[i], starts[i + 1]];
    const positions = Array.from({ length: end - filled }, (_, j) => filled + j);
    const feeds = {
      tokens: tensor("int64", tokens, [1, length]),
      label: tensor("int64", [label], [1]),
      positions: tensor("int64", positions, [positions.length]),
      guidance: tensor("float32", [guidanceAt(teacher, start)], [1]),
      filled: tensor("int64", [filled], [1]),
    };
    for (const name of names) feeds[name] = tensor("float32", cache[name], shape);
    const outputs = await run(feeds, ["logits", ...names.map((name) => `new_${name}`)]);
    const fresh = positions.length * teacher.head_width;
    for (const name of names) {
      const made = outputs[`new_${name}`].data;
      for (let row = 0; row < rows; row++) {
        const place = (row * span.end + filled) * teacher.head_width;
        cache[name].set(made.subarray(row * fresh, (row + 1) * fresh), place);
      }
    }
    const codes = outputs.logits.dims[2];
    const first = positions.length - (end - start);
    for (let j = start; j < end; j++) {
      const at = (first + j - start) * codes;
      tokens[j] = choose(outputs.logits.data.subarray(at, at + codes), uniforms[j], teacher);
    }
    filled = end;
  }
  return tokens.slice(0, span.end);
}

/** The g of logits c + g (c - u) in the step that starts at a position (VAR lets it rise, LlamaGen does not). */
function guidanceAt({ guidance, cfg, starts }, start) {
  if (guidance === "constant") return Math.max(cfg - 1, 0);
  return (cfg * starts.indexOf(start)) / Math.max(starts.length - 2, 1);
}

/** One token: logits float32 (V) and a number between 0 and 1. top_k 1: the first of the largest. */
export function choose(logits, number, { top_k, top_p, temperature }) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!Number.isFinite(logits[best])) {
    throw new DDError("engine_failed", "The teacher's logits are not finite.", "Take another precision.");
  }
  if (top_k === 1) return best;
  const mass = weights(logits, logits[best], top_k, top_p, temperature);
  let whole = 0;
  for (const share of mass) whole += share;
  let cumulated = 0;
  for (let i = 0; i < mass.length; i++) {
    cumulated += mass[i];
    if (cumulated > number * whole) return i;
  }
  return best;
}

/** Proportional to the filtered probabilities, float64 (V). Equal logits share their fate. */
function weights(logits, largest, top_k, top_p, temperature) {
  const scaled = Float64Array.from(logits, (logit) => logit / temperature - largest / temperature);
  if (top_k < scaled.length) {
    const kth = scaled.toSorted()[scaled.length - top_k];
    scaled.forEach((value, i) => { if (value < kth) scaled[i] = -Infinity; });
  }
  const mass = scaled.map(Math.exp);
  if (top_p < 1) {
    const falling = mass.toSorted().reverse();
    const wanted = top_p * falling.reduce((sum, share) => sum + share, 0);
    let above = 0;
    let last = 0;
    for (let i = 0; i < falling.length && above < wanted; i++) {
      last = i;
      above += falling[i];
    }
    mass.forEach((share, i) => { if (share < falling[last]) mass[i] = 0; });
  }
  return mass;
}

/** The nearest codebook entries of vectors float32 (P*Cv): int32 (P), the first of equal ones. */
export function nearestCodes(vectors, codebook, width) {
  const codes = new Int32Array(vectors.length / width);
  for (let p = 0; p < codes.length; p++) {
    let least = Infinity;
    for (let code = 0; code * width < codebook.length; code++) {
      let distance = 0;
      for (let i = 0; i < width; i++) distance += (vectors[p * width + i] - codebook[code * width + i]) ** 2;
      if (distance < least) [least, codes[p]] = [distance, code];
    }
  }
  return codes;
}
