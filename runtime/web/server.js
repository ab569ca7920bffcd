/** The engine of the page where `ddexport serve` draws; docs/serving.md has its requests. */
import { DDError } from "./errors.js";

/** site: { server: URL, key }. The server's models, and `open`, as local.js has them. */
export async function connect({ server, key }) {
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  const ask = (path, options) => request(server + path, { headers, ...options });
  const models = (await ask("models")).data.map(({ id, title }) => ({ name: id, title }));
  const open = async (name) => modelOf(await ask(`models/${encodeURIComponent(name)}`), ask);
  return { local: false, models, open };
}

function modelOf({ id: name, prompts, size, engine, ...facts }, ask) {
  const [width, height] = size.split("x").map(Number);
  const device = `server: ${engine.backend}, ${engine.device}, ${engine.precision}`;

  async function draw({ label, seed, signal, ...rest }, onImage) {
    const began = performance.now();
    const fields = JSON.stringify({ model: name, prompt: String(label), ...rest });
    const body = `${fields.slice(0, -1)},"seed":${seed}}`; // 64 bits, which JSON.stringify cannot write
    const { data } = await ask("images/generations", { method: "POST", body, signal });
    const total = (performance.now() - began) / 1000 / data.length;
    for (const [index, { b64_json: text }] of data.entries()) {
      const png = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      onImage({ label, index, image: await createImageBitmap(new Blob([png])), seconds: { total } });
    }
  }

  const image = { width, height };
  const { random_weights: randomWeights, max_images: mostImages } = facts;
  const sentences = prompts === "sentences";
  return { ...facts, name, sentences, device, image, randomWeights, mostImages, draw };
}

/** The JSON that the server answers. While its queue is full, asks again when it says so. */
async function request(url, options) {
  const answer = await fetch(url, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new DDError("network", "The server does not answer.", "Try again later.");
  });
  if (answer.status === 429) {
    const seconds = answer.headers.get("retry-after") ?? 1;
    await new Promise((resolve) => { setTimeout(resolve, 1000 * seconds); });
    return request(url, options);
  }
  const { error, ...content } = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  throw new DDError(error?.code ?? "network", error?.message ?? `The server says ${answer.status}.`);
}
