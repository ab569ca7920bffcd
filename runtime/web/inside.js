/** How an image was drawn, in a dialog: noise, composed sequence, and what the decoder makes of its parts. */
import { canvasOf, chip, download, duration, element } from "./dom.js";

const NUMBERED = 6; // cells of a side up to which there is room for numbers
const dialog = document.getElementById("inside");
const part = (name) => dialog.querySelector(name);
let shown;

/** Shows an image of a panel. A server's records have no steps: then it is the image alone. */
export function openInside(model, panel, index) {
  const record = panel.records[index];
  const { steps = [], seconds } = record;
  const picture = canvasOf(record.image);
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
  part(".strips").hidden = !steps.length;
  if (!dialog.open) dialog.showModal();
  if (steps.length) showStep(steps.length - 1);
}

function showStep(number) {
  const { model: { sequence: { length, width }, scales }, record } = shown;
  const { role, known, tokens, sequence } = record.steps[number];
  const latents = record.noise.slice();
  if (number) latents.set(record.steps[number - 1].sequence.subarray(0, known * width));
  const input = role === "teacher" ? { what: "uniforms", values: record.uniforms, width: 1 }
    : { what: "noise", values: latents, width, known };
  const output = { what: "sequence", values: sequence, width, known, tokens };
  let end = 0;
  const parts = (scales ?? [Math.sqrt(length)]).map((side) => {
    const start = end;
    end += side * side;
    return { side, start, end, tile: element("div", { className: "tile" }) };
  });
  const strip = (name, cell) => part(name).replaceChildren(...parts.map((one) =>
    element("li", {}, cell(one), scales ? element("small", {}, `${one.side} \u00d7 ${one.side}`) : "")));
  part(".strips").classList.toggle("raster", !scales);
  strip(".input", (one) => mapOf(input, one));
  strip(".output", (one) => mapOf(output, one));
  strip(".decoded", ({ tile }) => tile);
  decode(sequence, parts);
}

/** Fills each tile with the image of the sequence up to its end, the rest zero. */
async function decode(sequence, parts) {
  const { model, panel } = shown;
  for (const { tile, end } of parts) {
    if (!tile.isConnected || !dialog.open) return; // the visitor went on
    const begun = sequence.slice().fill(0, end * model.sequence.width);
    tile.replaceChildren(canvasOf(await model.decode(begun, panel.decoder)));
  }
}

/** Positions of a part as side x side cells; the first three of `width` numbers are the colour. */
function mapOf({ what, values, width, known = 0, tokens = [] }, { side, start, end }) {
  const rms = Math.hypot(...values) / Math.sqrt(values.length);
  const brightness = (value) => Math.round(width === 1 ? 255 * value : 128 + (56 * value) / rms);
  const own = Array.from(tokens).slice(start, end);
  const map = element("div", { className: `map ${what}`, role: "img" });
  map.ariaLabel = `${what}, ${side} by ${side}${own.length ? `, tokens ${own.join(" ")}` : ""}`;
  map.style.setProperty("--side", side);
  for (let position = start; position < end; position++) {
    const token = tokens[position];
    const colour = [0, 1, 2].map((i) => brightness(values[position * width + Math.min(i, width - 1)]));
    const light = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 128;
    const cell = element("span", { title: `Position ${position}` }, side > NUMBERED ? "" : token ?? "");
    cell.style.background = `rgb(${colour.join(" ")})`;
    cell.style.color = light ? "#000" : "#fff";
    cell.classList.toggle("known", position < known);
    cell.classList.toggle("token", token !== undefined);
    if (token !== undefined) cell.title += `, token ${token}`;
    map.append(cell);
  }
  return map;
}

function turn(by) {
  const { model, panel, index } = shown;
  if (panel.records[index + by]) openInside(model, panel, index + by);
}

part(".previous").onclick = () => turn(-1);
part(".next").onclick = () => turn(1);
part(".close").onclick = () => dialog.close();
