/** How an image was drawn, in a dialog: noise, composed sequence, and what the decoder makes of its parts. */
import { canvasOf, chip, download, duration, element } from "./dom.js";

const SIDE = 192; // pixels of a map, before the style scales it
const NUMBERED = 30; // pixels of a cell that has room for a number
const dialog = document.getElementById("inside");
const part = (name) => dialog.querySelector(name);
let shown;

/** Shows the image of a panel. A server's records have no steps: then there is the image alone. */
export function openInside(model, panel, index) {
  const record = panel.records[index];
  const { steps = [], image, seconds } = record;
  const picture = canvasOf(image);
  const times = Object.entries(seconds).map(([name, time]) => `${name} ${duration(time)}`);
  shown = { model, panel, index, record };
  part("h2").replaceChildren(panel.name, element("small", {}, `${panel.title}, image ${index + 1}`));
  part(".previous").disabled = !panel.records[index - 1];
  part(".next").disabled = !panel.records[index + 1];
  part(".picture").replaceChildren(picture);
  part(".times").textContent = `Seed ${panel.seed}, ${panel.decoder} decoder. Time: ${times.join(", ")}.`;
  part(".save").onclick = () => download(picture, panel.fileOf(index));
  part(".tabs").hidden = steps.length < 2;
  part(".chips").replaceChildren(...steps.map(({ role }, i) => chip(`${i + 1}. ${role}`, {
    type: "radio", name: "step", checked: i === steps.length - 1, onchange: () => showStep(i),
  })));
  part(".strips").replaceChildren();
  if (!dialog.open) dialog.showModal();
  if (steps.length) showStep(steps.length - 1);
}

function showStep(number) {
  const { model: { sequence: { length, width }, scales }, record } = shown;
  const { role, known, tokens, sequence } = record.steps[number];
  const sides = scales ?? [Math.sqrt(length)];
  const ends = sides.map((_, i) => sides.slice(0, i + 1).reduce((sum, side) => sum + side * side, 0));
  const latents = record.noise.slice();
  if (number) latents.set(record.steps[number - 1].sequence.subarray(0, known * width));
  const teacher = role === "teacher";
  const input = teacher ? { what: "uniform numbers", values: record.uniforms, width: 1, known: 0, tokens: [] }
    : { what: "noise", values: latents, width, known, tokens: [] };
  const output = { what: "sequence", values: sequence, width, known, tokens };
  const strip = (title, note, cell) => element("section", {},
    element("h3", {}, title), element("p", { className: "note" }, note),
    element("ol", {}, ...sides.map((side, i) => element("li", {}, cell(side, ends[i] - side * side),
      scales ? element("small", {}, `${side} \u00d7 ${side}`) : ""))));
  const decoded = sides.map(() => element("div", { className: "tile" }));
  part(".strips").classList.toggle("raster", !scales);
  part(".strips").replaceChildren(
    strip(teacher ? "Chance" : "Noise", teacher ? "A number from 0 to 1 for each position, by which the teacher takes a token."
      : `${width} normal numbers for each position. Three of them make the colour.`,
    (side, start) => mapOf(input, side, start)),
    strip("Sequence", "Squares are tokens of the codebook with their numbers, circles are embeddings that the network "
      + `computed.${known ? " Rings mark what was known before this step." : ""}`,
    (side, start) => mapOf(output, side, start)),
    strip("Image", scales ? "What the decoder makes of the sequence up to each scale." : "What the decoder makes of it.",
      (side) => decoded[sides.indexOf(side)]),
  );
  decode(sequence, ends.map((end) => end * width), decoded);
}

/** Fills each tile with the image of the sequence up to an end, the rest zero. */
async function decode(sequence, ends, tiles) {
  const { model, panel } = shown;
  for (const [i, tile] of tiles.entries()) {
    if (!tile.isConnected || !dialog.open) return; // the visitor went on
    tile.replaceChildren(canvasOf(await model.decode(sequence.slice().fill(0, ends[i]), panel.decoder)));
  }
}

/** Positions from `start` on as side x side cells whose colour is the first three of `width` numbers. */
function mapOf({ what, values, width, known, tokens }, side, start) {
  const own = Array.from(tokens).slice(start, start + side * side);
  const canvas = element("canvas", {
    className: "map", width: SIDE, height: SIDE, role: "img",
    ariaLabel: `${what}, ${side} by ${side}${own.length ? `, tokens ${own.join(" ")}` : ""}`,
  });
  const context = canvas.getContext("2d");
  const cell = SIDE / side;
  const rms = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
  const brightness = (value) => (width === 1 ? 255 * value : 128 + (56 * value) / rms);
  Object.assign(context, { textAlign: "center", textBaseline: "middle", font: `600 ${Math.min(cell * 0.36, 40)}px monospace` });
  for (let i = 0; i < side * side; i++) {
    const position = start + i;
    const [x, y] = [((i % side) + 0.5) * cell, (Math.floor(i / side) + 0.5) * cell];
    const colour = [0, 1, 2].map((channel) => brightness(values[position * width + Math.min(channel, width - 1)]));
    const outline = (radius) => {
      context.beginPath();
      if (what === "sequence" && i >= own.length) context.arc(x, y, radius, 0, 2 * Math.PI);
      else context.roundRect(x - radius, y - radius, 2 * radius, 2 * radius, radius / 6);
    };
    context.fillStyle = `rgb(${colour.join(" ")})`;
    outline(cell / 2 - 1);
    context.fill();
    context.fillStyle = context.strokeStyle = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 128 ? "#000" : "#fff";
    outline(cell * 0.42);
    if (position < known) context.stroke();
    if (i < own.length && cell >= NUMBERED) context.fillText(own[i], x, y);
  }
  canvas.onmousemove = ({ offsetX, offsetY }) => {
    const [column, row] = [offsetX / canvas.clientWidth, offsetY / canvas.clientHeight].map((at) => Math.floor(at * side));
    const token = own[row * side + column];
    canvas.title = `Position ${start + row * side + column}${token === undefined ? "" : `, token ${token}`}`;
  };
  return canvas;
}

function turn(by) {
  const { model, panel, index } = shown;
  if (panel.records[index + by]) openInside(model, panel, index + by);
}

part(".previous").onclick = () => turn(-1);
part(".next").onclick = () => turn(1);
part(".close").onclick = () => dialog.close();
dialog.onclick = ({ target }) => { if (target === dialog) dialog.close(); }; // the backdrop
dialog.onkeydown = ({ key, target }) => {
  if (target.type === "radio") return; // there arrows choose a step
  if (key === "ArrowLeft") turn(-1);
  if (key === "ArrowRight") turn(1);
};
