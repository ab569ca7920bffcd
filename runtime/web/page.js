/** The page: opens a model, keeps controls and URL in step, draws. Its engine is local.js or server.js. */
import { readJson } from "./bundle.js";
import { chip, count, duration, element, megabytes } from "./dom.js";
import { compare, layOut, show, titleOf } from "./panels.js";
import { pickLabels, writeSentences } from "./picker.js";

const WORDS = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten"];
const FIRST_LABELS = [207, 7, 0]; // a golden retriever of ImageNet, a seven of the digits
const [FIRST_IMAGES, MOST_IMAGES] = [8, 64];
const QUICK = 16; // network steps of a teacher that is chosen at first
const SMALL = 64; // pixels of a side up to which images are shown pixel by pixel
const KEY_NEEDED = "invalid_api_key";

const at = (id) => document.getElementById(id);
const form = at("controls");
const { model: choice, seed: seedField, n: countField } = form.elements;
let site, engine, model, drawing;

/** Opens what the URL names, and draws if it says what. */
async function start() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  let size = 0;
  complain();
  report("loading", "Loading", NaN);
  try {
    site ??= await readJson("", { file: "site.json" });
    engine = await (await (site.server ? import("./server.js") : import("./local.js"))).connect(site);
    const { models } = engine;
    const { name, title } = models.find((one) => one.name === wanted.get("model")) ?? models[0];
    choice.replaceChildren(...models.map((one) => new Option(one.name)));
    choice.value = name;
    at("models").hidden = models.length < 2;
    at("title").textContent = title;
    // A link with the small decoder needs no other one.
    const decoder = wanted.get("decoder") === "small" ? "small" : undefined;
    model = await engine.open(name, decoder, ({ file, loaded, total }) => {
      size = total;
      if (loaded === total) report("loading", `Preparing ${megabytes(total)}`, NaN);
      else report("loading", `Loading ${file}, ${megabytes(loaded)} of ${megabytes(total)}`, loaded / total);
    });
  } catch (error) {
    if (error.code === KEY_NEEDED) at("key").hidden = false;
    if (error.code !== KEY_NEEDED || site.key) complain(error);
    return;
  } finally {
    report("loading", "");
  }
  at("key").hidden = true;
  describe(size);
  fillControls(wanted);
  if (wanted.has("label")) await draw();
  else layOut(at("results"), model, request()); // what is to come
}

/** What the model is. size: bytes that were loaded. */
function describe(size) {
  const { image: { width, height }, labels, schedules } = model;
  const fewest = Math.min(...schedules.map(({ passes }) => passes));
  const teacher = schedules.find(({ steps }) => steps === "teacher");
  const most = teacher?.passes ?? model.scales?.length ?? model.sequence?.length ?? fewest;
  const instead = most > fewest ? ` instead of ${WORDS[most]?.toLowerCase() ?? most}` : "";
  at("claim").textContent = `${WORDS[fewest] ?? fewest} network step${fewest === 1 ? "" : "s"}${instead}.`;
  at("passes").style.setProperty("--passes", most);
  at("passes").style.setProperty("--done", fewest);
  at("bars").hidden = !engine.local; // a server does not say how long its parts took
  at("where").textContent = engine.local
    ? "It runs in this browser: what you draw stays on your machine." : "It runs on the server of this page.";
  const source = labels.length ? count(labels.length, "label") : "sentences";
  const facts = { Image: `${width} \u00d7 ${height}`, "Drawn from": source, "Computed by": model.device };
  if (size) facts.Weights = megabytes(size);
  at("facts").replaceChildren(...Object.entries(facts).map(fact));
  at("licence").replaceChildren(...Object.entries(model.licence).map(fact));
  at("card").textContent = model.card;
  at("random").hidden = !model.randomWeights;
  document.body.className = width <= SMALL ? "ready pixels" : "ready";
}

function fact([name, value]) {
  const text = [value].flat().map((one) => one.toLocaleString("en")).join(", ");
  return element("div", {}, element("dt", {}, name.replaceAll("_", " ")), element("dd", {}, text));
}

/** Controls from the parameters of a URL where the model has such, else its own. */
function fillControls(wanted) {
  const { labels, schedules, decoders, mostImages = MOST_IMAGES } = model;
  const chosen = (name, values, otherwise) => {
    const known = wanted.getAll(name).filter((value) => values.includes(value));
    return known.length ? known : otherwise;
  };
  const chips = (input, values, titles, otherwise) => {
    const checked = chosen(input.name, values, otherwise);
    return values.map((value, i) => chip(titles[i], { ...input, value, checked: checked.includes(value) }));
  };
  const steps = schedules.map((schedule) => String(schedule.steps));
  const first = schedules.at(-1).passes <= QUICK ? [steps[0], steps.at(-1)] : [steps[0]];
  const likely = FIRST_LABELS.find((number) => number < labels.length);
  const numbers = chosen("label", labels.map((_, number) => String(number)), [likely]).map(Number);
  if (model.sentences) writeSentences(at("labels"), wanted.get("label") ?? "");
  else pickLabels(at("labels"), model, numbers, remember);
  at("labels-title").textContent = model.sentences ? "Sentences" : "Labels";
  at("steps").replaceChildren(
    ...chips({ name: "steps", type: "checkbox" }, steps, schedules.map(titleOf), first));
  at("decoders").replaceChildren(
    ...chips({ name: "decoder", type: "radio" }, decoders, decoders, [decoders[0]]));
  at("decoder-field").hidden = decoders.length < 2;
  seedField.value = /^\d{1,20}$/.test(wanted.get("seed")) ? wanted.get("seed") : "0";
  countField.max = mostImages;
  const images = Number.parseInt(wanted.get("n"), 10) || FIRST_IMAGES;
  countField.value = Math.max(1, Math.min(images, mostImages));
  remember();
}

/** What the controls ask for. */
function request() {
  const data = new FormData(form);
  const steps = data.getAll("steps");
  return {
    labels: model.sentences
      ? data.get("label").split("\n").map((line) => line.trim()).filter(Boolean)
      : data.getAll("label").map(Number),
    schedules: model.schedules.filter((schedule) => steps.includes(String(schedule.steps))),
    seed: data.get("seed"),
    n: Number(data.get("n")),
    decoder: data.get("decoder"),
  };
}

/** Writes the controls into the URL, and what follows from them. */
function remember() {
  const { labels, schedules, n } = request();
  const panels = labels.length * schedules.length;
  history.replaceState(null, "", `#${new URLSearchParams(new FormData(form))}`);
  at("draw").textContent = panels ? `Draw ${count(panels * n, "image")}` : "Choose what to draw";
  at("draw").disabled = !panels;
}

async function draw() {
  complain();
  drawing?.abort();
  drawing = new AbortController();
  const { signal } = drawing;
  const { seed, n, decoder } = request();
  const panels = layOut(at("results"), model, request());
  const all = count(panels.length * n, "image");
  const began = performance.now();
  let done = 0;
  const progress = () => report("status", `Drawing ${all}`, done / (panels.length * n));
  progress();
  at("cancel").hidden = false;
  try {
    for (const panel of panels) {
      const { label, schedule: { steps } } = panel;
      await model.draw({ label, steps, seed: BigInt(seed), n, decoder, signal }, (record) => {
        if (signal.aborted) return;
        done += 1;
        show(panel, record);
        compare(panels);
        progress();
      }, ({ file, loaded, total }) => {
        if (!signal.aborted) report("status", `Loading ${file}`, loaded / total);
      });
      signal.throwIfAborted();
    }
    report("status", `${all} in ${duration((performance.now() - began) / 1000)}`);
  } catch (error) {
    if (drawing.signal !== signal) return; // the next drawing has begun
    report("status", signal.aborted ? "Cancelled" : "");
    if (!signal.aborted) complain(error);
  }
  at("cancel").hidden = true;
}

/** Text and bar of a box. share: 0 to 1, NaN if nobody knows, undefined for no bar. */
function report(id, text, share) {
  const [line, bar] = at(id).children;
  if (line.textContent !== text) line.textContent = text; // or a screen reader repeats it
  bar.hidden = share === undefined;
  if (share >= 0) bar.value = share;
  else bar.removeAttribute("value");
}

/** Shows an error in sentences: what is wrong, what to do. Nothing: there is none. */
function complain(error) {
  at("alert").textContent = error ? `${error.message} ${error.hint ?? ""}` : "";
  if (error && !error.code) console.error(error); // a fault of the page itself
}

form.onsubmit = (event) => {
  event.preventDefault();
  draw();
};
form.oninput = remember;
choice.onchange = () => { location.hash = new URLSearchParams({ model: choice.value }); };
at("dice").onclick = () => {
  [seedField.value] = crypto.getRandomValues(new Uint16Array(1));
  remember();
};
at("cancel").onclick = () => drawing.abort();
at("key").onsubmit = (event) => {
  event.preventDefault();
  site.key = event.target.elements.key.value;
  start();
};
addEventListener("hashchange", () => location.reload());
start();
