/** Runs a bundle, where local.js can start one in a thread of its own, so that the page stays alive. */
import { load } from "./ddexport.js";

let pipe;

const methods = {
  async load({ url, ...options }, onProgress) {
    pipe = await load(url, { ...options, onProgress });
    const { manifest, labels, aliases, device, threads } = pipe;
    return { manifest, labels, aliases, device, threads, precision: pipe.precision };
  },
  async draw({ label, ...request }, onProgress) {
    const { drawn: [record] } = await pipe([label], { ...request, onProgress });
    return record;
  },
  decode: ({ sequence, decoder }) => pipe.decode(sequence, decoder),
};

/** The result of a method. */
export const ask = (method, argument, onProgress) => methods[method](argument, onProgress);

if (!globalThis.embedded) {
  self.onmessage = ({ data: { port, method, argument } }) => {
    const tell = (kind) => (value) => port.postMessage({ kind, value });
    const told = ({ message, hint, code }) => tell("error")({ message, hint, code });
    ask(method, argument, tell("progress")).then(tell("result"), told);
  };
}
