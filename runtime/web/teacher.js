/** The auto-regressive teacher of one image, as runtime/teacher.py; docs/teacher.md has its rules. */
import { DDError } from "./errors.js";

/**
 * The tokens int32 (end) of a span behind a prefix (start). teacher: of the manifest. uniforms: float64 (L).
 * run(feeds, names): the graph, from tensors to tensors by name.
 */
export async function generate({ run, tensor, teacher, span, prefix, label, uniforms }) {
  const { layers, heads, head_width: width } = teacher;
  const length = teacher.starts.at(-1);
  const tokens = new Int32Array(length);
  tokens.set(prefix);
  const names = Array.from({ length: layers }, (_, i) => [`key_${i}`, `value_${i}`]).flat();
  const shape = [2, 1, heads, span.end, width];
  const size = shape.reduce((product, side) => product * side);
  const cache = Object.fromEntries(names.map((name) => [name, new Float32Array(size)]));
  let filled = 0;
  const starts = teacher.starts.filter((start) => start >= span.start && start <= span.end);
  for (const [i, end] of starts.slice(1).entries()) {
    const positions = Array.from({ length: end - filled }, (_, j) => filled + j);
    const feeds = {
      tokens: tensor("int64", tokens, [1, length]),
      label: tensor("int64", [label], [1]),
      positions: tensor("int64", positions, [positions.length]),
      guidance: tensor("float32", [guidanceAt(teacher, starts[i])], [1]),
      filled: tensor("int64", [filled], [1]),
    };
    for (const name of names) feeds[name] = tensor("float32", cache[name], shape);
    const { logits, ...outputs } = await run(feeds, ["logits", ...names.map((name) => `new_${name}`)]);
    const fresh = positions.length * width;
    for (const name of names) {
      const made = outputs[`new_${name}`].data;
      for (let row = 0; row < 2 * heads; row++) {
        const place = (row * span.end + filled) * width;
        cache[name].set(made.subarray(row * fresh, (row + 1) * fresh), place);
      }
    }
    const codes = logits.dims[2];
    for (let j = starts[i]; j < end; j++) {
      const at = (j - filled) * codes;
      tokens[j] = choose(logits.data.subarray(at, at + codes), uniforms[j], teacher);
    }
    filled = end;
  }
  return tokens.slice(0, span.end);
}

/** The g of logits c + g (c - u) in the step from a position on: VAR lets it rise, LlamaGen does not. */
function guidanceAt({ guidance, cfg, starts }, start) {
  if (guidance === "constant") return Math.max(cfg - 1, 0);
  return (cfg * starts.indexOf(start)) / Math.max(starts.length - 2, 1);
}

/** One token: logits float32 (V) and a number between 0 and 1. top_k 1: the first of the largest. */
export function choose(logits, number, { top_k, top_p, temperature }) {
  const largest = logits.reduce((most, logit) => Math.max(most, logit));
  if (!Number.isFinite(largest)) {
    throw new DDError("engine_failed", "The teacher's logits are not finite.", "Take another precision.");
  }
  const best = logits.indexOf(largest);
  if (top_k === 1) return best;
  // Proportional to the filtered probabilities. Equal logits share their fate.
  const scaled = Float64Array.from(logits, (logit) => logit / temperature - largest / temperature);
  const kth = scaled.toSorted().at(-Math.min(top_k, scaled.length));
  let mass = scaled.map((value) => (value < kth ? 0 : Math.exp(value)));
  if (top_p < 1) {
    const falling = mass.toSorted().reverse();
    const above = cumulated(falling);
    const wanted = top_p * above.at(-1);
    const least = falling[above.findIndex((sum) => sum >= wanted)];
    mass = mass.map((share) => (share < least ? 0 : share));
  }
  const sums = cumulated(mass);
  const token = sums.findIndex((sum) => sum > number * sums.at(-1));
  return token < 0 ? best : token;
}

function cumulated(values) {
  let sum = 0;
  return values.map((value) => (sum += value));
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
