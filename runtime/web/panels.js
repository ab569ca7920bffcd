/** The images of a request: a section of each label, in it a panel of each schedule, side by side. */
import { canvasOf, count, download, duration, element } from "./dom.js";
import { openInside } from "./inside.js";

/** "1 step", "3 steps, teacher helps", "teacher, 10 steps". */
export function titleOf({ steps, passes, teacher }) {
  if (steps === "teacher") return `teacher, ${count(passes, "step")}`;
  return count(steps, "step") + (teacher ? ", teacher helps" : "");
}

/** Fills a box with empty panels in the order of drawing; each image has its place, so that nothing jumps. */
export function layOut(box, model, { labels, schedules, ...same }) {
  const sections = labels.map((label) => schedules.map((schedule) => panelOf(model, label, schedule, same)));
  box.replaceChildren(...sections.map((panels, i) => element("section", {},
    element("h2", {}, nameOf(model, labels[i]),
      element("small", {}, model.sentences ? "" : ` class ${labels[i]}`)),
    element("div", { className: "panels" }, ...panels.map(({ node }) => node)))));
  box.style.setProperty("--panels", schedules.length);
  box.style.setProperty("--ratio", model.image.width / model.image.height);
  compare(sections.flat());
  return sections.flat();
}

const nameOf = ({ labels, sentences }, label) => (sentences ? label : labels[label]);

function panelOf(model, label, schedule, { seed, n, decoder }) {
  const node = document.getElementById("panel").content.cloneNode(true).firstElementChild;
  const part = (name) => node.querySelector(name);
  const [name, title] = [nameOf(model, label), titleOf(schedule)];
  const fileOf = (...what) =>
    `${[model.name, name, `seed ${seed}`, title, ...what].join(" ").replace(/[^\p{L}\p{N}]+/gu, "-")}.png`;
  const panel = { node, part, label, name, schedule, title, seed, decoder, fileOf, records: [] };
  panel.tiles = Array.from({ length: n }, (_, index) => element("button", {
    type: "button", className: "tile", disabled: true, ariaLabel: `${name}, ${title}, image ${index + 1}`,
    onclick: () => openInside(model, panel, index),
  }));
  part("h3").textContent = title;
  part(".ticks").style.setProperty("--passes", schedule.passes);
  part(".grid").append(...panel.tiles.map((tile) => element("li", {}, tile)));
  part(".save").ariaLabel = `Save PNG of ${name}, ${title}`;
  part(".save").onclick = () => download(sheetOf(panel.records, model.image), fileOf());
  return panel;
}

/** Puts an image into its place. */
export function show({ part, records, tiles }, record) {
  const index = Number(record.index);
  records[index] = record;
  tiles[index].replaceChildren(canvasOf(record.image));
  tiles[index].disabled = false;
  part(".save").disabled = records.length < tiles.length;
  const total = records.reduce((sum, one) => sum + secondsOf(one), 0);
  part(".time").replaceChildren(
    element("strong", {}, duration(medianOf(records, secondsOf))), ` an image, ${duration(total)} in all`);
}

/** Bars as long as the median time of an image; until all panels have one, as the number of network steps. */
export function compare(panels) {
  const timed = panels.every(({ records }) => records.length);
  const whole = ({ records, schedule }) => (timed ? medianOf(records, secondsOf) : schedule.passes);
  const rest = ({ records }) => (timed ? medianOf(records, ({ seconds }) => seconds.decoder ?? 0) : 0);
  const longest = Math.max(...panels.map(whole));
  for (const panel of panels) {
    panel.part(".ticks").style.setProperty("--share", (whole(panel) - rest(panel)) / longest);
    panel.part(".rest").style.setProperty("--share", rest(panel) / longest);
  }
}

const secondsOf = ({ seconds }) => Object.values(seconds).reduce((sum, part) => sum + part);

/** The first image of a graph takes longer; a median leaves that out. */
function medianOf(records, value) {
  return records.map(value).sort((one, other) => one - other)[(records.length - 1) >> 1];
}

/** All images on one canvas. */
function sheetOf(records, { width, height }) {
  const columns = Math.ceil(Math.sqrt(records.length));
  const rows = Math.ceil(records.length / columns);
  const canvas = element("canvas", { width: columns * width, height: rows * height });
  const context = canvas.getContext("2d");
  records.forEach(({ image }, i) =>
    context.drawImage(canvasOf(image), (i % columns) * width, Math.floor(i / columns) * height));
  return canvas;
}
