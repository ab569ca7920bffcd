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
  const normal = (words) => [...boxMuller(words[0], words[1]), ...boxMuller(words[2], words[3])];
  return fill(new Float32Array(count), seed, image, GAUSSIAN_DOMAIN, normal);
}

/** A number between 0 and 1 for each position of an image, float64 (length,): a teacher draws by them. */
export function uniformNumbers(seed, image, length) {
  const uniform = (words) => words.map((word) => (word + 0.5) / WORD);
  return fill(new Float64Array(length), seed, image, UNIFORM_DOMAIN, uniform);
}

function fill(values, seed, image, domain, numbersOf) {
  const key = wordsOf(seed, "seed");
  const counter = wordsOf(image, "image index");
  for (let i = 0; i < values.length; i += 4) {
    const numbers = numbersOf(philox4x32([i / 4, domain, ...counter], key));
    values.set(numbers.slice(0, values.length - i), i);
  }
  return values;
}

function boxMuller(first, second) {
  const radius = Math.sqrt(-2 * logOfShare(first + 1));
  const quarter = Math.floor((second + QUARTER / 2) / QUARTER);
  const angle = (second - quarter * QUARTER) * (Math.PI / 2 / QUARTER);
  const sine = sineOf(angle);
  const cosine = cosineOf(angle);
  const [x, y] = [[cosine, sine], [-sine, cosine], [-cosine, -sine], [sine, -cosine]][quarter % 4];
  return [radius * x, radius * y];
}

/** Philox4x32-10 (Salmon et al., SC 2011): counter (4,) and key (2,) of 32-bit words -> four words. */
function philox4x32([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < ROUNDS; round++) {
    const [low0, high0] = product(c0, 0xd2511f53);
    const [low1, high1] = product(c2, 0xcd9e8d57);
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ k0) >>> 0, low1, (high0 ^ c3 ^ k1) >>> 0, low0];
    [k0, k1] = [(k0 + 0x9e3779b9) >>> 0, (k1 + 0xbb67ae85) >>> 0];
  }
  return [c0, c1, c2, c3];
}

/** The words of the product of two, the lower one first. BigInts would take eight times as long. */
function product(a, b) {
  const carry = Math.floor((a * (b & 0xffff)) / 65536); // exact, as all sums and products below 2^53
  return [Math.imul(a, b) >>> 0, Math.floor((a * (b >>> 16) + carry) / 65536)];
}

/** The 32-bit words of a BigInt below 2^64, the lower one first. */
const halves = (number) => [Number(number & 0xffffffffn), Number(number >> 32n)];

function wordsOf(value, what) {
  const whole = typeof value === "bigint" || Number.isSafeInteger(value);
  if (whole && value >= 0 && value < 2n ** 64n) return halves(BigInt(value));
  throw new DDError("invalid_value", `The ${what} must be an integer from 0 to 2^64 - 1, but is ${value}.`);
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
