/** The engine of the page that computes on the visitor's own machine; server.js is the other one. */
import { passesOf, scheduleOf, stepsOf } from "./bundle.js";
import { DDError } from "./errors.js";

const DEVICES = { wasm: "WebAssembly", webgpu: "WebGPU" };

/** site: site.json. Models by name, and `open`, which fetches one. */
export function connect(site) {
  return {
    local: true,
    models: site.bundles.map(({ name, title }) => ({ name, title })),
    open: (name, how) => openModel(site.bundles.find((bundle) => bundle.name === name), how),
  };
}

async function openModel({ url, precision }, { decoder, onProgress = () => {} } = {}) {
  const worker = startWorker();
  const base = globalThis.embedded ? url : new URL(url, document.baseURI).href;
  const options = { decoder, precision };
  const argument = { url: base, options, embedded: globalThis.embedded };
  const opened = await worker.ask("load", argument, { progress: onProgress }).catch((error) => {
    worker.close();
    throw error;
  });
  const { manifest, labels, aliases, device, threads } = opened;
  const schedules = stepsOf(manifest).map((steps) => {
    const schedule = scheduleOf(manifest, steps);
    return { steps, passes: passesOf(manifest, schedule), teacher: Boolean(schedule.teacher) };
  });
  const decoders = Object.entries(manifest.decoders ?? {}).map(([name, { operations }]) =>
    ({ name, note: `${(100 * operations).toFixed(0)} % of the operations, a little less exact` }));
  const threaded = threads > 1 ? `, ${threads} threads` : ", 1 thread";
  return {
    name: manifest.name,
    title: manifest.title,
    labels,
    aliases,
    schedules,
    decoders: [{ name: "full", note: "" }, ...decoders],
    image: manifest.image,
    sequence: manifest.sequence,
    scales: manifest.recipe.model?.scales ?? null,
    licence: manifest.licence,
    card: await fetch(globalThis.embedded?.[`${url}README.md`] ?? `${base}README.md`)
      .then((response) => (response.ok ? response.text() : ""), () => ""),
    randomWeights: manifest.weights.kind === "random",
    device: `${DEVICES[device]}${device === "wasm" ? threaded : ""}, ${opened.precision}`,
    draw: ({ label, signal, ...request }, onImage, onProgress = () => {}) =>
      worker.ask("draw", { label, request }, { image: onImage, progress: onProgress, signal }),
    decode: (sequence, decoder) => worker.ask("decode", { sequence, decoder }),
    close: () => worker.close(),
  };
}

/** A worker whose `ask` is a promise. */
function startWorker() {
  const script = globalThis.embedded?.["worker.js"] ?? new URL("worker.js", import.meta.url);
  const worker = new Worker(script, { type: "module" });
  const asked = new Map();
  let number = 0;
  worker.onmessage = ({ data: { id, kind, value } }) => asked.get(id)?.[kind]?.(value);
  worker.onerror = () => {
    const error = new DDError("engine_failed", "The worker of this page has stopped.", "Reload the page.");
    for (const { fail } of asked.values()) fail(error);
  };
  return {
    close: () => worker.terminate(),
    ask(method, argument, { signal, ...events } = {}) {
      number += 1;
      const id = number;
      const cancel = () => worker.postMessage({ method: "cancel", argument: id });
      return new Promise((result, fail) => {
        const error = ({ code, message, hint, name }) =>
          fail(code ? new DDError(code, message, hint) : new DOMException(message, name));
        asked.set(id, { ...events, result, error, fail });
        worker.postMessage({ id, method, argument });
        signal?.addEventListener("abort", cancel);
      }).finally(() => {
        asked.delete(id);
        signal?.removeEventListener("abort", cancel);
      });
    },
  };
}
