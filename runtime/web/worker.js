/** Runs a bundle in a thread of its own, so that the page stays alive: local.js sends the messages. */
import { load } from "./ddexport.js";

const cancels = new Map();
let pipe;

const methods = {
  async load({ url, options, embedded }, tell) {
    globalThis.embedded = embedded;
    pipe = await load(url, { ...options, onProgress: (progress) => tell("progress", progress) });
    const { manifest, labels, aliases, device, threads, precision } = pipe;
    return { manifest, labels, aliases, device, threads, precision };
  },
  async draw({ label, request }, tell, signal) {
    const onProgress = (progress) => tell("progress", progress);
    await pipe([label], { ...request, signal, onProgress, onImage: (record) => tell("image", record) });
  },
  decode: ({ sequence, decoder }) => pipe.decode(sequence, decoder),
};

self.onmessage = async ({ data: { id, method, argument } }) => {
  if (method === "cancel") return cancels.get(argument)?.abort();
  const controller = new AbortController();
  cancels.set(id, controller);
  const tell = (kind, value) => self.postMessage({ id, kind, value });
  try {
    tell("result", await methods[method](argument, tell, controller.signal));
  } catch (error) {
    const { name, message, hint, code } = error;
    tell("error", { name, message, hint, code });
  } finally {
    cancels.delete(id);
  }
};
