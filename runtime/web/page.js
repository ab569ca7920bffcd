/** The page: opens a model, keeps controls and URL in step, draws into panels. Its engine is local.js or server.js. */
import { canvasOf, chip, count, download, duration, element, megabytes, pairs } from "./dom.js";
import { openInside } from "./inside.js";
import { pickLabels } from "./picker.js";

const WORDS = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve"];
const FIRST_LABELS = [207, 7, 0]; // a golden retriever of ImageNet, a seven of the digits
const QUICK = 16; // passes of a teacher that is drawn unasked
const MOST_IMAGES = 64;
const SMALL = 64; // pixels of a side up to which images are shown pixel by pixel
const KEY_NEEDED = "invalid_api_key";

const at = (id) => document.getElementById(id);
const form = at("controls");
let site, engine, model, drawing;

/** Opens what the URL names, and draws if it says what. */
async function start() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  drawing?.abort();
  complain();
  try {
    site ??= await (await fetch(globalThis.embedded?.["site.json"] ?? "site.json")).json();
    engine ??= await (await (site.server ? import("./server.js") : import("./local.js"))).connect(site);
    const { models } = engine;
    const { name } = models.find((one) => one.name === wanted.get("model")) ?? models[0];
    at("models").hidden = models.length < 2;
    form.elements.model.replaceChildren(...models.map((one) => new Option(one.title, one.name, false, one.name === name)));
    if (model?.name !== name) await openModel(name);
  } catch (error) {
    at("loading").hidden = true;
    at("key").hidden = error.code !== KEY_NEEDED;
    if (error.code !== KEY_NEEDED || site.key) complain(error);
    return;
  }
  fillControls(wanted);
  if (wanted.has("label")) await draw();
}

async function openModel(name) {
  let loaded = 0;
  model?.close();
  model = undefined;
  at("work").hidden = true;
  at("results").replaceChildren();
  showLoading("Loading", "");
  model = await engine.open(name, { decoder: "full", onProgress({ file, total, ...progress }) {
    ({ loaded } = progress);
    if (loaded < total) showLoading(`Loading ${file}`, `${megabytes(loaded)} of ${megabytes(total)}`, loaded / total);
    else showLoading("Preparing the network", megabytes(loaded));
  } });
  describe(loaded);
  at("loading").hidden = at("key").hidden = true;
  at("work").hidden = false;
}

function showLoading(what, size, share) {
  at("loading").hidden = false;
  at("loading-what").textContent = what;
  at("loading-size").textContent = size;
  if (share === undefined) at("loading-bar").removeAttribute("value");
  else at("loading-bar").value = share;
}

/** What the model is: claim, facts, licence and card. */
function describe(loaded) {
  const { image, schedules } = model;
  const fewest = Math.min(...schedules.map(({ passes }) => passes));
  const whole = schedules.find(({ steps }) => steps === "teacher")?.passes ?? model.scales?.length ?? model.sequence?.length;
  const instead = whole > fewest ? ` instead of ${WORDS[whole]?.toLowerCase() ?? whole}` : "";
  at("title").textContent = model.title;
  at("claim").textContent = `${WORDS[fewest] ?? fewest} network step${fewest === 1 ? "" : "s"}${instead}.`;
  at("passes").hidden = !instead;
  at("passes").style.setProperty("--passes", whole);
  at("passes").style.setProperty("--done", fewest);
  at("where").textContent = engine.local
    ? "It runs in this browser: what you draw stays on your machine." : "It runs on the server of this page.";
  at("facts").replaceChildren(...pairs([
    ["Image", `${image.width} \u00d7 ${image.height}`], ["Labels", model.labels.length.toLocaleString("en")],
    ["Computed by", model.device], ...(loaded ? [["Loaded", megabytes(loaded)]] : []),
  ]));
  at("random").hidden = !model.randomWeights;
  at("licence").replaceChildren(...pairs(Object.entries(model.licence).map(([name, text]) =>
    [name.replaceAll("_", " "), [text].flat().join(", ")])));
  at("card").textContent = model.card;
}

function nameOf({ steps, passes, teacher }) {
  if (steps === "teacher") return `teacher, ${count(passes, "step")}`;
  return count(steps, "step") + (teacher ? ", teacher helps" : "");
}

/** Controls from the parameters of a URL where the model has such, else its own. */
function fillControls(wanted) {
  const known = (name, values, otherwise) => {
    const good = wanted.getAll(name).filter((value) => values.includes(value));
    return good.length ? good : otherwise;
  };
  const { schedules, decoders, labels } = model;
  const most = model.mostImages ?? MOST_IMAGES;
  const names = schedules.map(({ steps }) => String(steps));
  const steps = known("steps", names, [names[0], ...(schedules.at(-1).passes <= QUICK ? names.slice(-1) : [])]);
  const [decoder] = known("decoder", decoders.map(({ name }) => name), [decoders[0].name]);
  const first = FIRST_LABELS.find((number) => number < labels.length);
  pickLabels(at("labels"), model, known("label", labels.map((_, number) => String(number)), [first]).map(Number), remember);
  at("steps").replaceChildren(...schedules.map((schedule, i) =>
    chip("checkbox", "steps", names[i], nameOf(schedule), steps.includes(names[i]))));
  at("decoders").replaceChildren(...decoders.map(({ name }) => chip("radio", "decoder", name, name, name === decoder)));
  at("decoder-field").hidden = decoders.length < 2;
  form.elements.seed.value = /^\d{1,20}$/.test(wanted.get("seed")) ? wanted.get("seed") : "0";
  form.elements.n.max = most;
  form.elements.n.value = Math.min(/^[1-9]\d*$/.test(wanted.get("n")) ? Number(wanted.get("n")) : 8, most);
  remember();
}

/** Writes the controls into the URL, and what follows from them. */
function remember() {
  const data = new FormData(form);
  const images = data.getAll("label").length * data.getAll("steps").length * data.get("n");
  history.replaceState(null, "", `#${new URLSearchParams(data)}`);
  at("draw").textContent = images > 0 ? `Draw ${count(images, "image")}` : "Draw";
  at("decoder-note").textContent = model.decoders.find(({ name }) => name === data.get("decoder")).note;
}

/** The controls as a request. Raises an error that says what is missing. */
function request() {
  const data = new FormData(form);
  const [seed, n, most] = [data.get("seed").trim(), Number(data.get("n")), Number(form.elements.n.max)];
  const schedules = model.schedules.filter(({ steps }) => data.getAll("steps").includes(String(steps)));
  const rules = [
    [data.has("label"), "Choose a label."],
    [schedules.length, "Choose a number of steps."],
    [/^\d+$/.test(seed) && BigInt(seed) < 2n ** 64n, "A seed is a whole number from 0 to 2^64 - 1."],
    [Number.isInteger(n) && n >= 1 && n <= most, `Draw 1 to ${most} images of a label.`],
  ];
  const broken = rules.find(([holds]) => !holds);
  if (broken) throw Object.assign(new Error(broken[1]), { code: "invalid_value" });
  return { labels: data.getAll("label").map(Number), schedules, seed: BigInt(seed), n, decoder: data.get("decoder") };
}

async function draw() {
  complain();
  drawing?.abort();
  const mine = (drawing = new AbortController());
  const { signal } = mine;
  try {
    const { labels, schedules, ...same } = request();
    const began = performance.now();
    const panels = layOut(labels, schedules, same);
    const all = panels.length * same.n;
    let done = 0;
    busy(0, `Drawing ${count(all, "image")}`);
    for (const panel of panels) {
      const asked = { label: panel.label, steps: panel.schedule.steps, signal, ...same };
      await model.draw(asked, (record) => {
        if (signal.aborted) return;
        show(panel, record);
        compare(panels);
        busy(++done / all, `Drawing ${count(all, "image")}`);
      }, ({ file, loaded, total }) => busy(loaded / total, `Loading ${file}, ${megabytes(total)}`));
      signal.throwIfAborted();
    }
    busy(undefined, `${count(all, "image")} in ${duration((performance.now() - began) / 1000)}`);
  } catch (error) {
    if (drawing !== mine) return; // another drawing has begun
    busy(undefined, signal.aborted ? "Cancelled" : "");
    if (!signal.aborted) complain(error);
  }
}

/** Shows how much of a work is done, from 0 to 1; undefined: none is going on. */
function busy(share, text) {
  at("cancel").hidden = at("drawn").hidden = share === undefined;
  at("results").setAttribute("aria-busy", String(share !== undefined));
  at("drawn").value = share ?? 0;
  if (at("status").textContent !== text) at("status").textContent = text; // a screen reader says what changes
}

/** Empty panels: a section of each label, in it a panel of each schedule, with a place for each image. */
function layOut(labels, schedules, { seed, n, decoder }) {
  const panels = labels.flatMap((label) => schedules.map((schedule) => {
    const node = at("panel").content.cloneNode(true).firstElementChild;
    const [name, title] = [model.labels[label], nameOf(schedule)];
    const kind = schedule.steps === "teacher" ? "teacher" : `${schedule.steps}step${schedule.steps === 1 ? "" : "s"}`;
    const stem = `${model.name}-${name.replace(/[^\p{L}\p{N}]+/gu, "-")}-seed${seed}`;
    const panel = { node, label, name, schedule, title, seed, decoder, records: [],
      fileOf: (index) => `${stem}${index === undefined ? "" : `-${index}`}-${kind}.png` };
    panel.tiles = Array.from({ length: n }, (_, index) => element("button", {
      type: "button", className: "tile", disabled: true, ariaLabel: `${name}, ${title}, image ${index + 1}`,
      onclick: () => openInside(model, panel, index, engine.local),
    }));
    node.querySelector("h3").textContent = title;
    node.querySelector(".ticks").style.setProperty("--passes", schedule.passes);
    node.querySelector(".save").onclick = () => download(sheet(panel), panel.fileOf());
    node.querySelector(".save").ariaLabel = `Save PNG: ${name}, ${title}`;
    node.querySelector(".grid").append(...panel.tiles.map((tile) => element("li", {}, tile)));
    return panel;
  }));
  at("results").replaceChildren(...labels.map((label) => element("section", { className: "drawn" },
    element("h2", {}, model.labels[label], element("small", {}, ` ${label}`)),
    element("div", { className: "panels" }, ...panels.filter((panel) => panel.label === label).map(({ node }) => node)))));
  const { style } = at("results");
  style.setProperty("--panels", schedules.length);
  style.setProperty("--ratio", model.image.width / model.image.height);
  at("results").classList.toggle("pixels", model.image.width <= SMALL);
  compare(panels);
  return panels;
}

function show(panel, record) {
  const { node, records, tiles } = panel;
  const index = Number(record.index);
  records[index] = record;
  tiles[index].replaceChildren(canvasOf(record.image));
  tiles[index].disabled = false;
  node.querySelector(".save").disabled = records.length < tiles.length;
  const total = records.flatMap(({ seconds }) => Object.values(seconds)).reduce((sum, part) => sum + part);
  panel.mean = total / records.length;
  node.querySelector(".time").replaceChildren(
    element("strong", {}, duration(panel.mean)), ` an image, ${duration(total)} in all`);
}

/** Bars as long as the time of an image; until all have one, as the number of passes. */
function compare(panels) {
  const timed = panels.every(({ mean }) => mean);
  const lengths = panels.map(({ mean, schedule }) => (timed ? mean : schedule.passes));
  panels.forEach(({ node }, i) =>
    node.querySelector(".ticks").style.setProperty("--share", lengths[i] / Math.max(...lengths)));
}

/** All images of a panel on one canvas. */
function sheet({ records }) {
  const { width, height } = model.image;
  const columns = Math.ceil(Math.sqrt(records.length));
  const canvas = element("canvas", { width: columns * width, height: Math.ceil(records.length / columns) * height });
  const context = canvas.getContext("2d");
  records.forEach(({ image }, i) =>
    context.putImageData(image, (i % columns) * width, Math.floor(i / columns) * height));
  return canvas;
}

/** Shows an error in sentences: what is wrong, what to do. Nothing: there is none. */
function complain(error) {
  const sentences = [error?.message, error?.hint].filter(Boolean);
  at("alert").textContent = sentences.map((text) => (/[.!?]$/.test(text) ? text : `${text}.`)).join(" ");
  if (error && !error.code) console.error(error); // a fault of the page itself
}

form.onsubmit = (event) => {
  event.preventDefault();
  draw();
};
form.oninput = remember;
form.elements.model.onchange = (event) => {
  location.hash = new URLSearchParams({ model: event.target.value });
};
at("dice").onclick = () => {
  form.elements.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
  remember();
};
at("cancel").onclick = () => drawing.abort();
at("key").onsubmit = (event) => {
  event.preventDefault();
  site.key = event.target.elements.key.value;
  start();
};
addEventListener("hashchange", start);
start();
