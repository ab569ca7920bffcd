/** From the decoder's floats to 8-bit images. */
import { DDError } from "./errors.js";

/** Channels-first floats in [0, 1] (C*H*W) -> ImageData: round(clip(x, 0, 1) * 255), ties to even. */
export function toImageData(floats, { height, width, channels }) {
  const image = new ImageData(width, height);
  const size = width * height;
  for (let pixel = 0; pixel < size; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = floats[(channels === 3 ? channel : 0) * size + pixel];
      if (!Number.isFinite(value)) {
        throw new DDError("engine_failed", "The decoder's image is not finite.", "Take another precision.");
      }
      // Computed in float32; a clamped array rounds ties to even.
      image.data[4 * pixel + channel] = Math.fround(Math.min(Math.max(value, 0), 1) * 255);
    }
    image.data[4 * pixel + 3] = 255;
  }
  return image;
}
