// Starts a page in one file (docs/browser.md): from a disk a page fetches nothing but its own blob: URLs.
const TYPES = { js: "text/javascript", wasm: "application/wasm" };
const packed = JSON.parse(document.getElementById("files").textContent);
const embedded = {}; // URLs by path

async function embed(path) {
  if (embedded[path]) return;
  const bytes = Uint8Array.from(atob(packed[path]), (character) => character.charCodeAt(0));
  const unpacked = new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
  const ending = path.split(".").at(-1);
  let content = await (ending === "js" ? unpacked.text() : unpacked.arrayBuffer());
  for (const [quoted, name] of ending === "js" ? content.matchAll(/"\.\/([\w-]+\.js)"/g) : []) {
    await embed(name);
    content = content.replaceAll(quoted, `"${embedded[name]}"`);
  }
  embedded[path] = URL.createObjectURL(new Blob([content], { type: TYPES[ending] }));
}

for (const path of Object.keys(packed)) await embed(path);
globalThis.embedded = embedded;
await import(embedded["page.js"]);
