// The demo page: takes a photo or a bitstream from wherever it comes, sends it there and back, and shows what came.

import { Refused, compress, decompress, expectations, sample } from "./service.js";
import { Viewer } from "./viewer.js";
import { worsen } from "./worse.js";

const $ = id => document.getElementById(id);
const viewer = new Viewer($("viewer"), $("canvas"));
let photo = null, name = "photo", again = null, running = null, links = [], bits = null, loading = null, offered = null;

const key = () => $("key").value || kept() || "";
const bytes = n => n < 1e4 ? `${n} bytes` : n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(2)} MB`;

// The key, over a reload; where the browser blocks site data there is no such thing.
function kept(...value) {
  try {
    return value.length ? sessionStorage.setItem("limpid-key", ...value) : sessionStorage.getItem("limpid-key");
  } catch {
    return null;
  }
}

function say(text) { $("status").textContent = text; }

// For a call: says that it waits for a service without room, and then again what is being done.
const waits = doing => seconds => say(seconds ? `The service is busy. Trying again in ${seconds} s...` : doing);

function complain(error, signal) {
  if (error.name === "AbortError") return;
  const hint = error.status === 504 && Number($("effort").value) ? ". Less effort takes less time." : "";
  $("error").textContent = error instanceof Refused ? error.message + hint : `This browser cannot open it: ${error.message}`;
  $("error").hidden = false;
  $("facts").hidden = true; // of what came before
  $("downloads").hidden = offered !== signal;
  say("");
  if (error.status === 401) {
    $("key-field").hidden = false;
    $("key").focus();
  }
}

function offer(id, blob, filename) {
  const url = URL.createObjectURL(blob);
  links.push(url);
  $(id).href = url;
  $(id).download = filename;
}

function showFacts(facts) {
  for (const [id, text] of Object.entries(facts)) {
    $(`fact-${id}`).textContent = text;
    $(`fact-${id}`).parentElement.hidden = !text;
  }
  $("facts").hidden = false;
}

function showPictures(before, after) {
  viewer.show(before, after);
  $("empty").hidden = Boolean(before || after);
  $("tag-before").hidden = $("tag-after").hidden = !(before && after);
}

// Run one job; a newer one ends it. The job gets a signal.
async function run(job) {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  $("error").hidden = true;
  try {
    await job(signal);
  } catch (error) {
    if (!signal.aborted) complain(error, signal);
  }
}

// The bitstream can be had, whatever becomes of the rest of its job.
function keep(stream, signal) {
  links.forEach(URL.revokeObjectURL);
  links = [];
  offered = signal;
  offer("save-stream", stream, `${name}.lmp`);
  $("facts").hidden = $("save-photo").hidden = true; // of the job before
  $("downloads").hidden = false;
}

function finish(restored, shown) {
  offer("save-photo", restored, `${name}-clean.png`);
  $("save-photo").hidden = false;
  $("empty").hidden = true;
  say(shown ? "Done." : "Done. This browser cannot show the clean photo, but it can be saved.");
  if (!bits) foresee(); // it told nothing until now: it was loading when the page was opened, say
}

const process = () => photo && run(async signal => {
  const kind = document.querySelector("input[name=worse]:checked").value;
  const rate = $("rate").value, effort = Number($("effort").value);
  const upload = await worsen(photo, kind, Number($("strength").value), signal);
  const before = await createImageBitmap(upload).catch(() => null); // a TIFF, say: the service can, the browser cannot
  if (signal.aborted) return void before?.close();
  if (before) showPictures(before, null);
  const doing = effort ? "Compressing with effort..." : "Compressing...";
  say(doing);
  const packed = await compress(upload, rate, effort, key(), signal, waits(doing));
  keep(packed.stream, signal);
  say("Decompressing...");
  const restored = await decompress(packed.stream, key(), signal, waits("Decompressing..."));
  const after = await createImageBitmap(restored.photo).catch(() => null);
  if (signal.aborted) return void after?.close();
  showPictures(before, after);
  showFacts({
    upload: bytes(upload.size),
    stream: bytes(packed.stream.size),
    bpp: packed.bpp.toFixed(3),
    ratio: upload.size < packed.stream.size ? "" : `${(upload.size / packed.stream.size).toFixed(1)} times`,
    found: packed.found,
    model: `${packed.model}, rate ${packed.rate}`,
    compress: packed.stages.join(", "),
    decompress: restored.stages.join(", "),
  });
  finish(restored.photo, after);
});

const openStream = stream => run(async signal => {
  say("Decompressing...");
  const restored = await decompress(stream, key(), signal, waits("Decompressing..."));
  const after = await createImageBitmap(restored.photo).catch(() => null);
  if (signal.aborted) return void after?.close();
  keep(stream, signal);
  showPictures(null, after);
  showFacts({
    upload: "",
    stream: bytes(stream.size),
    bpp: after ? (8 * stream.size / (after.width * after.height)).toFixed(3) : "",
    ratio: "",
    found: restored.found,
    model: `${restored.model}, rate ${restored.rate}`,
    compress: "",
    decompress: restored.stages.join(", "),
  });
  finish(restored.photo, after);
});

// Something to show is on its way; a slider that is moved meanwhile waits for it.
async function within(signal, coming) {
  loading = signal;
  try {
    return await coming;
  } finally {
    if (loading === signal) loading = null;
  }
}

// A file is read once: what is done with it later does not fail when it changed or went meanwhile.
const take = picked => picked && run(async signal => {
  const content = await within(signal, picked.arrayBuffer())
    .catch(() => { throw new Refused(0, `${picked.name} cannot be read.`); });
  if (signal.aborted) return;
  const file = new File([content], picked.name ?? "", { type: picked.type });
  name = (file.name ?? "photo").replace(/\.[^.]*$/, "") || "photo";
  const isStream = /\.lmp$/i.test(file.name ?? "") || file.type === "application/vnd.limpid";
  photo = isStream ? null : file;
  again = isStream ? () => openStream(file) : process;
  for (const one of document.querySelectorAll("#rate, #effort, #worse input")) one.disabled = isStream; // as it is written
  $("strength").disabled = isStream || document.querySelector("input[name=worse]:checked").value === "none";
  showPictures(null, null);
  $("facts").hidden = $("downloads").hidden = true;
  again();
});

function showRate() {
  const rate = $("rate").value, [low, high] = bits?.[rate] ?? [];
  const range = low && high ? `, about ${low.toFixed(2)} to ${high.toFixed(2)} bits per pixel` : "";
  $("rate-text").textContent = rate + range;
  $("rate").setAttribute("aria-valuetext", rate + range);
}

async function foresee() {
  const known = await expectations(key());
  if (known) {
    bits = known.bits;
    $("effort").max = known.effort;
    $("effort-field").hidden = !known.effort;
  }
  showRate();
  showEffort();
}

function showEffort() {
  const effort = $("effort").value, text = Number(effort) ? effort : "none";
  $("effort-text").textContent = text;
  $("effort").setAttribute("aria-valuetext", text);
}

let later;
const soon = () => { clearTimeout(later); later = setTimeout(() => loading?.aborted === false || process(), 150); };

$("file").addEventListener("click", event => { event.target.value = ""; }); // so that the same file can be picked again
$("file").addEventListener("change", event => take(event.target.files[0]));
$("rate").addEventListener("input", () => { showRate(); soon(); });
$("effort").addEventListener("input", () => { showEffort(); soon(); });
$("strength").addEventListener("input", soon);
$("worse").addEventListener("change", event => { $("strength").disabled = event.target.value === "none"; soon(); });
$("key").addEventListener("change", () => {
  kept($("key").value);
  again?.();
  foresee();
});
$("samples").addEventListener("click", event => {
  const chosen = event.target.closest("button")?.dataset.sample;
  if (chosen) run(async signal => take(await within(signal, sample(chosen, signal))));
});
document.addEventListener("paste", event => take(event.clipboardData?.files[0]));
document.addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dragging"); });
document.addEventListener("dragleave", () => document.body.classList.remove("dragging"));
document.addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files[0]);
});
await foresee();
