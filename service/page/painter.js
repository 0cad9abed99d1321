// Paints noise, rain or haze into a photo, beside the page (a worker): on a large photo noise takes seconds.

const LARGEST_PNG = 4e6;

// A generator of numbers in [0, 1) that gives the same ones each time (mulberry32), so that a picture stays the same.
function numbers(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

function addNoise(context, { width, height }, strength) {
  const image = context.getImageData(0, 0, width, height), { data } = image;
  const random = numbers(1), sigma = 5 + 7 * strength;
  for (let i = 0; i < data.length; i += 4) {
    for (let channel = 0; channel < 3; channel++) {
      const normal = Math.sqrt(-2 * Math.log(random() || 1e-9)) * Math.cos(2 * Math.PI * random());
      data[i + channel] += sigma * normal;
    }
  }
  context.putImageData(image, 0, 0);
}

function addRain(context, { width, height }, strength) {
  const random = numbers(2), unit = Math.sqrt(width * height) / 600;
  const slant = (random() - 0.5) * 0.8;
  context.fillStyle = `rgb(200 205 210 / ${0.012 * strength})`;
  context.fillRect(0, 0, width, height);
  context.lineCap = "round";
  for (let drop = 0; drop < 200 * strength; drop++) {
    const length = (12 + 26 * random()) * unit, x = random() * width * 1.2 - width * 0.1, y = random() * height;
    context.strokeStyle = `rgb(235 238 242 / ${0.35 + 0.45 * random()})`;
    context.lineWidth = (0.6 + 1.1 * random()) * unit;
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x + slant * length, y + length);
    context.stroke();
  }
}

function addHaze(context, { width, height }, strength) {
  const gradient = context.createLinearGradient(0, 0, 0, height), most = 0.35 + 0.055 * strength;
  gradient.addColorStop(0, `rgb(222 224 226 / ${most})`);
  gradient.addColorStop(1, `rgb(222 224 226 / ${most * 0.55})`);
  context.fillStyle = gradient;
  context.fillRect(0, 0, width, height);
}

const KINDS = { noise: addNoise, rain: addRain, haze: addHaze };

// Takes [photo, kind, strength]; answers with a PNG, or a JPEG where that would be very large, or with an error's words.
onmessage = async ({ data: [photo, kind, strength] }) => {
  try {
    const picture = await createImageBitmap(photo), { width, height } = picture;
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { willReadFrequently: kind === "noise" });
    context.drawImage(picture, 0, 0);
    picture.close();
    KINDS[kind](context, { width, height }, strength);
    const large = width * height > LARGEST_PNG;
    postMessage(await canvas.convertToBlob(large ? { type: "image/jpeg", quality: 0.95 } : { type: "image/png" }));
  } catch (error) {
    postMessage(error.message);
  }
};
