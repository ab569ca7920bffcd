/** onnxruntime-web (https://onnxruntime.ai): WebAssembly, or WebGPU where there is a real adapter. */
import { address, readFile } from "./bundle.js";
import { DDError, explained } from "./errors.js";

// Of the pinned version, which ddexport/site.py copies.
const BUILDS = {
  wasm: {
    script: "ort.wasm.bundle.min.js",
    file: "ort-wasm-simd-threaded.wasm",
    bytes: 14239897,
    sha256: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
  },
  webgpu: {
    script: "ort.webgpu.bundle.min.js",
    file: "ort-wasm-simd-threaded.asyncify.wasm",
    bytes: 26781914,
    sha256: "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
  },
};
const FOLDER = "onnxruntime/";
const MAX_THREADS = 8;
// A function that uses a 128-bit vector: https://github.com/GoogleChromeLabs/wasm-feature-detect
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0,
  65, 0, 253, 15, 253, 98, 11);

/**
 * Opens graphs. device: "auto", "wasm" or "webgpu". threads: of WebAssembly, all sessions together.
 * onProgress({ file, loaded, total }): in bytes of ONNX Runtime.
 */
export async function openEngine({ device, precision, threads, onProgress }) {
  if (!WebAssembly.validate(SIMD)) {
    throw new DDError("no_simd", "This browser has no WebAssembly with SIMD.", "Use a newer browser.");
  }
  const chosen = await deviceOf(device, precision);
  const { script, ...binary } = BUILDS[chosen];
  const failed = (error) => { throw explained(error, "load ONNX Runtime"); };
  const ort = await import(address(FOLDER + script)).catch(failed);
  const content = await readFile(FOLDER, binary, counter("ONNX Runtime", binary.bytes, onProgress));
  // Threads share memory, which browsers allow to isolated pages only.
  const most = Math.min(navigator.hardwareConcurrency ?? 1, MAX_THREADS);
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? threads ?? most : 1;
  ort.env.wasm.wasmBinary = content.buffer;
  ort.env.logLevel = "error";
  return {
    device: chosen,
    threads: ort.env.wasm.numThreads,
    tensor: (type, values, dims) =>
      new ort.Tensor(type, type === "int64" ? Array.from(values) : values, dims),
    open: (base, graph, onBytes) => openGraph(ort, chosen, base, graph, onBytes),
  };
}

/** A function that adds up bytes, and tells how far a file is. */
export function counter(file, total, onProgress = () => {}) {
  let loaded = 0;
  return (bytes) => {
    loaded += bytes;
    onProgress({ file, loaded: Math.min(loaded, total), total });
  };
}

async function deviceOf(device, precision) {
  if (!["auto", "wasm", "webgpu"].includes(device)) {
    throw new DDError("invalid_value", `There is no device ${device}.`, "Give auto, wasm or webgpu.");
  }
  if (device === "wasm" || globalThis.embedded) return "wasm"; // a page in one file has this alone
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const half = adapter?.features.has("shader-f16") || precision !== "fp16";
  if (device === "auto") {
    return adapter && half && !adapter.info?.isFallbackAdapter ? "webgpu" : "wasm";
  }
  if (!adapter) throw new DDError("no_webgpu", "This browser has no WebGPU.", "Let the page choose.");
  if (half) return "webgpu";
  throw new DDError("no_fp16", "This GPU cannot compute in fp16.", "Take another precision, or WebAssembly.");
}

async function openGraph(ort, device, base, graph, onBytes) {
  const content = {};
  for (const info of graph.files) content[info.file] = await readFile(base, info, onBytes);
  const { [graph.file]: model, ...weights } = content;
  try {
    const session = await ort.InferenceSession.create(model, {
      // A teacher's cache lies in the memory of the host.
      executionProviders: [graph.role === "teacher" ? "wasm" : device],
      externalData: Object.entries(weights).map(([path, data]) => ({ path, data })),
    });
    const failed = (error) => { throw explained(error, `run ${graph.file}`); };
    return {
      run: (feeds, names) => session.run(feeds, names).catch(failed),
      release: () => session.release(),
    };
  } catch (error) {
    throw explained(error, `open ${graph.file}`);
  }
}
