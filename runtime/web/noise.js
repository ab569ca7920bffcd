/** Random numbers from a counter, bit-equal to runtime/noise.py: docs/bundle.md has the construction. */
import { DDError } from "./errors.js";

const GAUSSIAN_DOMAIN = 0;
const UNIFORM_DOMAIN = 2;
const ROUNDS = 10;
const WORD = 2 ** 32;
const QUARTER = 2 ** 30;
const LN2_HIGH = 6.9314718036912381649e-1;
const LN2_LOW = 1.90821492927058770002e-10;

/** Standard normal noise of one image: float32 (count,). seed, image: numbers or BigInts below 2^64. */
export function gaussianNoise(seed, image, count) {
  const values = new Float32Array(Math.ceil(count / 4) * 4);
  forBlocks(seed, image, values.length / 4, GAUSSIAN_DOMAIN, (block, words) => {
    for (let pair = 0; pair < 4; pair += 2) { // Box-Muller
      const radius = Math.sqrt(-2 * logOfShare(words[pair] + 1));
      const quarter = Math.floor((words[pair + 1] + QUARTER / 2) / QUARTER);
      const angle = (words[pair + 1] - quarter * QUARTER) * (Math.PI / 2 / QUARTER);
      const sine = sineOf(angle);
      const cosine = cosineOf(angle);
      const [x, y] = [[cosine, sine], [-sine, cosine], [-cosine, -sine], [sine, -cosine]][quarter % 4];
      values[4 * block + pair] = radius * x;
      values[4 * block + pair + 1] = radius * y;
    }
  });
  return values.subarray(0, count);
}

/** A number between 0 and 1 for each position of an image, float64 (length,): a teacher draws by them. */
export function uniformNumbers(seed, image, length) {
  const values = new Float64Array(Math.ceil(length / 4) * 4);
  forBlocks(seed, image, values.length / 4, UNIFORM_DOMAIN, (block, words) => {
    for (let i = 0; i < 4; i++) values[4 * block + i] = (words[i] + 0.5) / WORD;
  });
  return values.subarray(0, length);
}

/** Philox4x32-10 (Salmon et al., SC 2011): counter (4,) and key (2,) of 32-bit words -> four words. */
export function philox4x32(counter, key) {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < ROUNDS; round++) {
    const high0 = highWord(c0, 0xd2511f53);
    const high1 = highWord(c2, 0xcd9e8d57);
    const low0 = Math.imul(c0, 0xd2511f53);
    const low1 = Math.imul(c2, 0xcd9e8d57);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1 >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** The upper half of the 64-bit product of two words; every number on the way is an exact float64. */
function highWord(a, b) {
  const carry = Math.floor((a * (b & 0xffff)) / 65536);
  return Math.floor((a * (b >>> 16) + carry) / 65536);
}

function forBlocks(seed, image, blocks, domain, take) {
  const key = wordsOf(seed, "seed");
  const [low, high] = wordsOf(image, "image index");
  for (let block = 0; block < blocks; block++) take(block, philox4x32([block, domain, low, high], key));
}

function wordsOf(value, what) {
  const whole = typeof value === "bigint" || Number.isSafeInteger(value);
  if (!whole || value < 0 || BigInt(value) >= 1n << 64n) {
    throw new DDError("invalid_value", `The ${what} must be an integer from 0 to 2^64 - 1, but is ${value}.`);
  }
  const number = BigInt(value);
  return [Number(number & 0xffffffffn), Number(number >> 32n)];
}

// The polynomials of fdlibm (Sun Microsystems, 1993), without branches. The functions of Math differ between
// browsers in the last bit; + - * / and sqrt do not.

/** log(n / 2^32) for an integer n from 1 to 2^32. */
function logOfShare(n) {
  let exponent = n === WORD ? 33 : 32 - Math.clz32(n);
  let mantissa = n * 2 ** -exponent;
  if (mantissa < Math.SQRT1_2) {
    mantissa *= 2;
    exponent -= 1;
  }
  const k = exponent - 32;
  const f = mantissa - 1;
  const s = f / (2 + f);
  const z = s * s;
  const w = z * z;
  const even = w * (3.999999999940941908e-1 + w * (2.222219843214978396e-1 + w * 1.531383769920937332e-1));
  const odd = z * (6.66666666666673513e-1 + w * (2.857142874366239149e-1
    + w * (1.818357216161805012e-1 + w * 1.479819860511658591e-1)));
  const half = 0.5 * f * f;
  return k * LN2_HIGH - (half - (s * (half + (even + odd)) + k * LN2_LOW) - f);
}

/** The sine of an angle from -pi/4 to pi/4. */
function sineOf(x) {
  const z = x * x;
  const r = 8.33333333332248946124e-3 + z * (-1.98412698298579493134e-4 + z * (2.75573137070700676789e-6
    + z * (-2.50507602534068634195e-8 + z * 1.58969099521155010221e-10)));
  return x + z * x * (-1.66666666666666324348e-1 + z * r);
}

/** The cosine of an angle from -pi/4 to pi/4. */
function cosineOf(x) {
  const z = x * x;
  const r = z * (4.16666666666666019037e-2 + z * (-1.38888888888741095749e-3 + z * 2.48015872894767294178e-5))
    + z * z * (z * z) * (-2.75573143513906633035e-7
    + z * (2.0875723212981748279e-9 + z * -1.13596475577881948265e-11));
  const half = 0.5 * z;
  const w = 1 - half;
  return w + (1 - w - half + z * r);
}
