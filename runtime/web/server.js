// The engine of the page where `ddexport serve` answers: the server draws. docs/serving.md has its requests.

const MOST_IMAGES = 10; // the server's own default, where it does not say

/** The engine of a site: { models, local, open }. site: { server: URL, key? }. Raises an error with a code. */
export async function connect(site) {
  const headers = { "content-type": "application/json", ...(site.key && { authorization: `Bearer ${site.key}` }) };
  const ask = (path, options) => request(site.server + path, { headers, ...options });
  const { data } = await ask("models");
  const open = async (name) => modelOf(ask, await ask(`models/${encodeURIComponent(name)}`));
  return { models: data.map(({ id, title }) => ({ name: id, title })), local: false, open };
}

function modelOf(ask, facts) {
  if (facts.prompts !== "labels") {
    throw fault(`${facts.id} draws from sentences, and this page from labels`, "Choose another model.", "text_model");
  }
  const [width, height] = facts.size.split("x").map(Number);
  const { backend, device, precision } = facts.engine;

  async function draw({ label, steps, seed, n, decoder }, onImage, { signal } = {}) {
    // The seed has up to 64 bits, which a number of JavaScript has not.
    const rest = JSON.stringify({ model: facts.id, prompt: String(label), n, steps, decoder });
    const body = `${rest.slice(0, -1)},"seed":${seed}}`;
    const began = performance.now();
    const { data } = await ask("images/generations", { method: "POST", body, signal });
    const total = (performance.now() - began) / 1000 / n;
    for (const [index, { b64_json: text }] of data.entries()) {
      onImage({ label, index, image: await pixels(text), seconds: { total } });
    }
  }

  return {
    name: facts.id, title: facts.title, labels: facts.labels, aliases: facts.aliases ?? {},
    schedules: facts.schedules, decoders: facts.decoders.map((name) => ({ name, note: "" })),
    image: { width, height }, mostImages: facts.max_images ?? MOST_IMAGES, card: facts.card,
    licence: facts.licence, randomWeights: facts.random_weights,
    device: `server: ${backend}, ${device}, ${precision}`, draw, close() {},
  };
}

/** The JSON that a server answers. While its queue is full, asks again when it says so. */
async function request(url, options) {
  let answer;
  try {
    answer = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw fault("The server does not answer", "Is it still running? Then try again.", "network");
  }
  if (answer.status === 429) {
    await pause(Number(answer.headers.get("retry-after") ?? 1), options.signal);
    return request(url, options);
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  throw fault(content.error?.message ?? `The server answered ${answer.status}`, "", content.error?.code ?? "network");
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => reject(signal.reason));
  });
}

/** A PNG in base64 -> ImageData. */
async function pixels(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

const fault = (message, hint, code) => Object.assign(new Error(message), { hint, code });
