// The two calls of the service, and what their headers say. No element of the page is touched here.

const ATTEMPTS = 5;

export class Refused extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

// What comes over the line, or the words for a line that broke.
async function received(answer) {
  try {
    return await answer;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service cannot be reached.");
  }
}

// Posts, and posts again where the service has no room or is not ready and says when; `waits` hears in how many seconds,
// and 0 once they are over.
async function call(path, body, type, key, signal, waits, attempt = 1) {
  const headers = { "Content-Type": type };
  if (/[^!-~]/.test(key)) throw new Refused(401, "No header can carry this key: expected visible ASCII characters.");
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await received(fetch(path, { method: "POST", body, headers, signal }));
  if (response.ok) return response;
  const wait = Number(response.headers.get("Retry-After"));
  if (wait && attempt < ATTEMPTS) {
    waits(wait);
    await pause(wait, signal);
    waits(0);
    return call(path, body, type, key, signal, waits, attempt + 1);
  }
  const text = await received(response.text());
  let detail = text;
  try {
    const problem = JSON.parse(text);
    if (problem.title && problem.detail) detail = `${problem.title}: ${problem.detail}`;
  } catch { /* a proxy's page: shown as it is */ }
  throw new Refused(response.status, detail || `status ${response.status}`);
}

// "noise;0.82, haze;0.31" in words; nothing where the model does not tell.
function findings(header) {
  const found = (header ?? "unknown").split(",").map(part => part.trim().split(";"));
  if (found[0][0] === "unknown") return "";
  if (found[0][0] === "clean") return `nothing (${Math.round(100 * Number(found[0][1]))}% sure)`;
  return found.map(([kind, strength]) => `${kind} ${strength}`).join(", ");
}

function facts(response) {
  const stages = (response.headers.get("Server-Timing") ?? "").split(",").map(part => part.trim()).filter(Boolean);
  return {
    rate: response.headers.get("Limpid-Rate"),
    model: response.headers.get("Limpid-Model"),
    found: findings(response.headers.get("Limpid-Degradation")),
    stages: stages.map(stage => stage.replace(/;dur=/, " ") + " ms"),
  };
}

export async function compress(photo, rate, effort, key, signal, waits) {
  const path = `compress?rate=${rate}&effort=${effort}`;
  const response = await call(path, photo, photo.type || "application/octet-stream", key, signal, waits);
  const bpp = Number(response.headers.get("Limpid-Bpp"));
  return { stream: await received(response.blob()), bpp, ...facts(response) };
}

export async function decompress(stream, key, signal, waits) {
  const response = await call("decompress", stream, "application/vnd.limpid", key, signal, waits);
  return { photo: await received(response.blob()), ...facts(response) };
}

export async function sample(name, signal) {
  const response = await received(fetch(`page/samples/${name}.jpg`, { signal }));
  if (!response.ok) throw new Refused(response.status, `The sample cannot be had: status ${response.status}.`);
  return new File([await received(response.blob())], `${name}.jpg`, { type: "image/jpeg" });
}

// Mean bits per pixel of each rate point on clean and on noisy photos, as measured, and the largest effort allowed;
// null where nothing is known.
export async function expectations(key) {
  try {
    const response = await fetch("variants", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    const { models, max_effort: effort } = await response.json();
    const bits = Object.fromEntries(models.find(one => one.default).variants.map(variant => {
      const mean = kind => variant.measured.find(m => m.photos === "kodak" && m.degradation === kind)?.bpp;
      return [variant.rate, [mean("noise-25"), mean("clean")]];
    }));
    return { bits, effort };
  } catch {
    return null;
  }
}
