/** How an image was drawn: noise, composed sequence and decoded parts, in a dialog. */
import { canvasOf, download, duration, element } from "./dom.js";

const MAP = 192; // pixels of a map's side, before the style scales it
const NUMBERED = 30; // pixels of a cell that has room for a token's number
const dialog = document.getElementById("inside");
const [title, body] = [dialog.querySelector("h2"), document.getElementById("inside-body")];
let shown = {};

/** Opens the dialog at an image of a panel. draws: whether the records say how (a server's do not). */
export function openInside(model, panel, index, draws) {
  const record = panel.records[index];
  shown = { model, panel, index, record, draws };
  title.replaceChildren(panel.name, element("small", {}, ` ${panel.title}, image ${index + 1} of ${panel.records.length}`));
  document.getElementById("inside-previous").disabled = !panel.records[index - 1];
  document.getElementById("inside-next").disabled = !panel.records[index + 1];
  const times = Object.entries(record.seconds).map(([part, seconds]) => `${part} ${duration(seconds)}`).join(" \u00b7 ");
  const save = element("button", { type: "button", className: "quiet" }, "Save PNG");
  save.onclick = () => download(canvasOf(record.image), panel.fileOf(index));
  const picture = canvasOf(record.image);
  picture.className = "picture";
  const steps = element("div", { className: "strips" });
  const tabs = !draws || record.steps.length < 2 ? [] : record.steps.map(({ role }, number) => {
    const input = element("input", { type: "radio", name: "step", checked: number === record.steps.length - 1 });
    input.onchange = () => showStep(steps, number);
    return element("label", { className: "chip" }, input, element("span", {}, `${number + 1}. ${role}`));
  });
  body.replaceChildren(
    element("div", { className: "summary" }, picture, element("div", {},
      element("p", {}, `Seed ${panel.seed}, decoder ${panel.decoder}.`), element("p", {}, times), save)),
    element("div", { className: "chips", role: "group", "aria-label": "Step" }, ...tabs), steps);
  if (draws) showStep(steps, record.steps.length - 1);
  if (!dialog.open) dialog.showModal();
}

function showStep(box, number) {
  const { model, record } = shown;
  const step = record.steps[number];
  const { length, width } = model.sequence;
  const sides = model.scales ?? [Math.sqrt(length)];
  const starts = sides.map((_, i) => sides.slice(0, i).reduce((sum, side) => sum + side * side, 0));
  const teacher = step.role === "teacher";
  const given = teacher ? Float32Array.from(record.uniforms) : record.noise.slice();
  if (!teacher) given.set(record.steps[number - 1]?.sequence.subarray(0, step.known * width) ?? []);
  const before = { values: given, width: teacher ? 1 : width, known: teacher ? 0 : step.known, tokens: [] };
  const after = { values: step.sequence, width, known: step.known, tokens: step.tokens };
  const strip = (view, what) => element("ol", {}, ...sides.map((side, i) =>
    element("li", {}, mapOf(view, starts[i], side, what), element("small", {}, `${side} \u00d7 ${side}`))));
  const decoded = element("ol", {}, ...sides.map((side) => element("li", {},
    element("div", { className: "tile" }), element("small", {}, sides.length > 1 ? `to ${side} \u00d7 ${side}` : "image"))));
  const section = (heading, note, list) =>
    element("section", {}, element("h3", {}, heading), element("p", { className: "note" }, note), list);
  box.classList.toggle("raster", sides.length === 1);
  box.replaceChildren(
    section(teacher ? "Chance" : "Noise", teacher
      ? "One uniform number a position; the teacher takes a token by it, one part after the other."
      : `Normal numbers of seed and image, ${width} a position; the first three are the colour.`, strip(before, "noise")),
    section("Sequence", "Squares are tokens of the codebook, with their numbers. Circles are embeddings that the network "
      + "made without a token. Rings: known before this step.", strip(after, "sequence")),
    section("Decoded", sides.length > 1 ? "The sequence up to each scale, the rest zero." : "The decoder reads the whole sequence.",
      decoded));
  decodeParts(step.sequence, sides.map((side, i) => (starts[i] + side * side) * width), [...decoded.children]);
}

/** Fills the tiles with the images of a growing part of the sequence. */
async function decodeParts(sequence, ends, items) {
  const { model, panel } = shown;
  for (const [i, end] of ends.entries()) {
    if (!items[i].isConnected || !dialog.open) return; // the visitor went on
    const image = await model.decode(sequence.slice().fill(0, end), panel.decoder);
    items[i].firstChild.replaceChildren(canvasOf(image));
  }
}

/** The positions from `start` as side x side cells: squares for tokens, circles for the rest, rings if known before. */
function mapOf({ values, width, known, tokens }, start, side, what) {
  const canvas = element("canvas", { width: MAP, height: MAP, role: "img" });
  const context = canvas.getContext("2d");
  const cell = MAP / side;
  const rms = Math.hypot(...values) / Math.sqrt(values.length) || 1;
  const colour = (value) => Math.min(Math.max(width === 1 ? value * 255 : 128 + (56 * value) / rms, 0), 255);
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.font = `600 ${Math.min(cell * 0.36, 40)}px ui-monospace, monospace`;
  for (let i = 0; i < side * side; i++) {
    const position = start + i;
    const at = (channel) => colour(values[position * width + (channel % width)]);
    const [red, green, blue] = [at(0), at(1), at(2)];
    const [x, y] = [(i % side) * cell, Math.floor(i / side) * cell];
    const token = tokens[position];
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.beginPath();
    if (what === "noise" || token !== undefined) context.roundRect(x + 1, y + 1, cell - 2, cell - 2, cell * 0.08);
    else context.arc(x + cell / 2, y + cell / 2, cell / 2 - 1, 0, 2 * Math.PI);
    context.fill();
    context.fillStyle = context.strokeStyle = 0.3 * red + 0.6 * green + 0.1 * blue > 128 ? "#000" : "#fff";
    if (position < known) {
      context.lineWidth = Math.max(1.5, cell * 0.03);
      context.stroke();
    }
    if (token !== undefined && cell >= NUMBERED) context.fillText(token, x + cell / 2, y + cell / 2);
  }
  const inside = [...tokens].slice(start, start + side * side);
  canvas.setAttribute("aria-label", `${what}, ${side} by ${side}${inside.length ? `, tokens ${inside.join(" ")}` : ""}`);
  canvas.onmousemove = ({ offsetX, offsetY }) => {
    const i = Math.floor((offsetY / canvas.clientHeight) * side) * side + Math.floor((offsetX / canvas.clientWidth) * side);
    canvas.title = `position ${start + i}${tokens[start + i] === undefined ? "" : `: token ${tokens[start + i]}`}`;
  };
  return canvas;
}

function turn(by) {
  const { model, panel, index, draws } = shown;
  if (panel.records[index + by]) openInside(model, panel, index + by, draws);
}

document.getElementById("inside-previous").onclick = () => turn(-1);
document.getElementById("inside-next").onclick = () => turn(1);
document.getElementById("inside-close").onclick = () => dialog.close();
dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); }; // the backdrop
dialog.onkeydown = (event) => {
  if (event.target.type === "radio") return; // arrows choose a step there
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
};
