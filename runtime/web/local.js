/** The engine of the page that computes on the visitor's own machine; server.js is the other one. */
import { address, decodersOf, schedulesOf } from "./bundle.js";
import { count } from "./dom.js";
import { DDError } from "./errors.js";

const STOPPED = "The worker of this page has stopped.";

/** site: site.json. Models by name, and `open`, which fetches one. */
export function connect({ bundles }) {
  return {
    local: true,
    models: bundles,
    open: (name, decoder, onProgress) =>
      openModel({ ...bundles.find((bundle) => bundle.name === name), decoder }, onProgress),
  };
}

async function openModel({ url, precision, decoder }, onProgress) {
  // A page in one file starts no worker: it computes itself.
  const { ask } = globalThis.embedded ? await import("./worker.js") : startWorker();
  const { manifest, device, threads, ...opened } = await ask("load", { url, precision, decoder }, onProgress);
  const engine = device === "wasm" ? `WebAssembly, ${count(threads, "thread")}` : "WebGPU";

  // One by one, so that the page shows what is ready and can stop.
  async function draw({ n, signal, ...request }, onImage, onProgress) {
    for (let firstImage = 0; firstImage < n && !signal?.aborted; firstImage++) {
      onImage(await ask("draw", { ...request, firstImage }, onProgress));
    }
  }

  return {
    ...manifest,
    ...opened,
    draw,
    decode: (sequence, decoder) => ask("decode", { sequence, decoder }),
    schedules: schedulesOf(manifest),
    decoders: decodersOf(manifest),
    scales: manifest.recipe.model?.scales,
    card: await fetch(address(`${url}README.md`)).then((answer) => (answer.ok ? answer.text() : "")),
    randomWeights: manifest.weights.kind === "random",
    device: `${engine}, ${opened.precision}`,
  };
}

/** worker.js in a thread of its own. */
function startWorker() {
  const worker = new Worker(address("worker.js"), { type: "module" });
  const ask = (method, argument, progress) => new Promise((result, fail) => {
    const { port1, port2 } = new MessageChannel();
    const error = ({ code, message, hint }) => fail(new DDError(code, message, hint));
    port1.onmessage = ({ data: { kind, value } }) => ({ progress, result, error })[kind]?.(value);
    worker.onerror = () => error({ code: "engine_failed", message: STOPPED, hint: "Reload the page." });
    worker.postMessage({ method, argument, port: port2 }, [port2]);
  });
  return { ask };
}
