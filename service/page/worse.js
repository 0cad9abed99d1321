// "Make it worse": noise, rain or haze, made in the browser, so that anyone sees the point in ten seconds.

let last = {}; // what was made last, for the next rate point

// The photo with more of one kind; strength from 1 to 10.
export async function worsen(photo, kind, strength, signal) {
  if (kind === "none") return photo;
  if (last.photo !== photo || last.kind !== kind || last.strength !== strength) {
    last = { photo, kind, strength, worse: await painted(photo, kind, strength, signal) };
  }
  return last.worse;
}

function painted(photo, kind, strength, signal) {
  const painter = new Worker("page/painter.js");
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
    painter.onmessage = ({ data }) => data instanceof Blob ? resolve(data) : reject(new Error(data));
    painter.onerror = () => reject(new Error("the photo could not be made worse"));
    painter.postMessage([photo, kind, strength]);
  }).finally(() => painter.terminate());
}
