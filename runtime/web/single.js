// The start of a page in one file (docs/browser.md). From a disk browsers start no module worker, and a worker may
// not fetch what the page has as blob: URLs. So page and worker both unpack everything, each into URLs of its own.
{
  const TYPES = { js: "text/javascript", mjs: "text/javascript", json: "application/json", wasm: "application/wasm" };

  /** blobs by path -> globalThis.embedded, blob: URLs by path, in modules `./x.js` replaced by them. */
  const embed = async (blobs) => {
    const embedded = {};
    const url = async (path) => {
      if (embedded[path]) return embedded[path];
      let blob = blobs[path];
      if (path.endsWith(".js")) {
        let text = await blob.text();
        for (const [quoted, name] of text.matchAll(/"\.\/([\w-]+\.js)"/g)) {
          text = text.replaceAll(quoted, `"${await url(name)}"`);
        }
        blob = new Blob([text], { type: blob.type });
      }
      return (embedded[path] = URL.createObjectURL(blob));
    };
    for (const path of Object.keys(blobs)) await url(path);
    // worker.js may be told the page's URLs, which are of no use to it.
    Object.defineProperty(globalThis, "embedded", { get: () => embedded, set() {} });
    return embedded;
  };

  /** A classic worker: its first message is the blobs; what comes before worker.js listens is sent again. */
  const boot = (embed) => {
    const early = [];
    self.onmessage = ({ data }) => {
      self.onmessage = (event) => early.push(event.data);
      embed(data).then((embedded) => import(embedded["worker.js"])).then(() => {
        for (const data of early) self.dispatchEvent(new MessageEvent("message", { data }));
      });
    };
  };

  const start = async () => {
    const packed = JSON.parse(document.getElementById("files").textContent);
    const blobs = {};
    for (const [path, text] of Object.entries(packed)) {
      const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const type = TYPES[path.split(".").pop()] ?? "application/octet-stream";
      blobs[path] = new Blob([await new Response(stream).arrayBuffer()], { type });
    }
    const program = URL.createObjectURL(new Blob([`(${boot})(${embed});`], { type: TYPES.js }));
    globalThis.Worker = class extends Worker {
      constructor() {
        super(program);
        this.postMessage(blobs);
      }
    };
    await import((await embed(blobs))["page.js"]);
  };
  start();
}
