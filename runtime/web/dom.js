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

/** A chip that can be chosen: a checkbox or radio of a form, drawn as its text. */
export function chip(type, name, value, text, checked) {
  return element("label", { className: "chip" }, element("input", { type, name, value, checked }), element("span", {}, text));
}

/** The pairs of a description list. */
export function pairs(facts) {
  return facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

/** A canvas with the pixels of an ImageData. */
export function canvasOf(image) {
  const canvas = element("canvas", { width: image.width, height: image.height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Gives the visitor a canvas as a PNG file. */
export function download(canvas, name) {
  canvas.toBlob((blob) => {
    const href = URL.createObjectURL(blob);
    element("a", { href, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  }, "image/png");
}

/** 0.0142 -> "14 ms", 3.21 -> "3.2 s". */
export function duration(seconds) {
  if (seconds < 0.9995) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  return `${seconds.toFixed(seconds < 9.95 ? 1 : 0)} s`;
}

export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
