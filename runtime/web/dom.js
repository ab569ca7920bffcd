/** What the modules of the page share. Text is set as text, never as HTML. */

/** An element with properties or attributes, and children (nodes or strings). */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A checkbox or radio that looks like its text. */
export function chip(text, input) {
  return element("label", { className: "chip" }, element("input", input), element("span", {}, text));
}

/** An ImageData or ImageBitmap as a canvas. */
export function canvasOf(image) {
  const canvas = element("canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  if (image instanceof ImageData) context.putImageData(image, 0, 0);
  else context.drawImage(image, 0, 0);
  return canvas;
}

/** Gives the visitor a canvas as a PNG file. */
export function download(canvas, name) {
  canvas.toBlob((blob) => {
    const href = URL.createObjectURL(blob);
    element("a", { href, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  });
}

/** 0.0142 -> "14 ms", 3.21 -> "3.2 s". */
export function duration(seconds) {
  return seconds < 0.9995 ? `${Math.ceil(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
