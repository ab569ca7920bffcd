/** The engine of the page where `ddexport serve` draws; docs/serving.md has its requests. */

const MOST_IMAGES = 10; // the server's default, where it does not say

/** site: { server: URL, key }. The server's models, and `open`; local.js has the same. */
export async function connect({ server, key }) {
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  const ask = (path, options) => request(server + path, { headers, ...options });
  const { data } = await ask("models");
  const models = data.map(({ id, title }) => ({ name: id, title }));
  return { local: false, models, open: async (name) => modelOf(await ask(`models/${encodeURIComponent(name)}`), ask) };
}

function modelOf(facts, ask) {
  if (facts.prompts !== "labels") {
    throw fault("text_model", `${facts.id} draws from sentences, this page from labels.`, "Choose another model.");
  }
  const [width, height] = facts.size.split("x").map(Number);
  const { backend, device, precision } = facts.engine;
  return {
    name: facts.id,
    title: facts.title,
    labels: facts.labels,
    aliases: facts.aliases ?? {},
    schedules: facts.schedules,
    decoders: facts.decoders.map((name) => ({ name, note: "" })),
    image: { width, height },
    mostImages: facts.max_images ?? MOST_IMAGES,
    card: facts.card,
    licence: facts.licence,
    randomWeights: facts.random_weights,
    device: `server: ${backend}, ${device}, ${precision}`,
    async draw({ label, seed, signal, ...rest }, onImage) {
      // A seed has up to 64 bits, which JSON.stringify cannot write.
      const fields = JSON.stringify({ model: facts.id, prompt: String(label), ...rest });
      const began = performance.now();
      const body = `${fields.slice(0, -1)},"seed":${seed}}`;
      const { data } = await ask("images/generations", { method: "POST", body, signal });
      const total = (performance.now() - began) / 1000 / data.length;
      for (const [index, { b64_json: text }] of data.entries()) {
        onImage({ label, index, image: await pixels(text), seconds: { total } });
      }
    },
    close() {},
  };
}

/** The JSON that the server answers. While its queue is full, asks again when it says so. */
async function request(url, options) {
  const answer = await fetch(url, options).catch((error) => {
    throw error.name === "AbortError" ? error : fault("network", "The server does not answer.", "Try again later.");
  });
  if (answer.status === 429) {
    await new Promise((resolve) => { setTimeout(resolve, 1000 * (answer.headers.get("retry-after") ?? 1)); });
    return request(url, options);
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  throw fault(content.error?.code ?? "network", content.error?.message ?? `The server says ${answer.status}.`);
}

/** A PNG in base64 as ImageData. */
async function pixels(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes]));
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

const fault = (code, message, hint = "") => Object.assign(new Error(message), { code, hint });
