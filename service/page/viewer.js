// Before and after on one canvas, under a divider: dragged, zoomed and panned together. Knows pictures, no service.

const LARGEST = 16;

export class Viewer {
  constructor(element, canvas) {
    this.element = element;
    this.canvas = canvas;
    this.before = this.after = null;
    this.divider = 0.5;
    this.pointers = new Map();
    new ResizeObserver(() => this.fit()).observe(element);
    element.addEventListener("pointerdown", event => this.#down(event));
    element.addEventListener("pointermove", event => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      element.addEventListener(name, event => this.pointers.delete(event.pointerId));
    }
    element.addEventListener("wheel", event => {
      if (!this.#size()) return;
      event.preventDefault();
      this.#zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    }, { passive: false });
    element.addEventListener("dblclick", () => this.fit());
    element.addEventListener("keydown", event => this.#key(event));
  }

  // Pictures are ImageBitmaps, closed once they are shown no more; either may be missing. The view is kept while the
  // size stays the same.
  show(before, after) {
    const old = this.#size() && { width: this.#size().width, height: this.#size().height };
    for (const picture of [this.before, this.after]) {
      if (picture && picture !== before && picture !== after) picture.close();
    }
    this.before = before;
    this.after = after;
    const now = this.#size();
    if (now) this.element.style.aspectRatio = `${now.width} / ${now.height}`;
    if (!old || !now || old.width !== now.width || old.height !== now.height) this.fit();
    else this.draw();
  }

  fit() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(this.element.clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(this.element.clientHeight * ratio));
    this.ratio = ratio;
    const size = this.#size();
    if (size) {
      this.scale = this.whole = Math.min(this.canvas.width / size.width, this.canvas.height / size.height);
      this.left = this.top = 0;
    }
    this.draw();
  }

  // No gap beside a picture that could fill it, and one that is smaller is in the middle: it cannot be lost.
  #held(offset, picture, frame) {
    return picture > frame ? Math.min(0, Math.max(frame - picture, offset)) : (frame - picture) / 2;
  }

  draw() {
    const { canvas } = this, context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const size = this.#size();
    this.element.classList.toggle("zoomed", Boolean(size) && this.scale > 1.001 * this.whole);
    if (!size) return;
    this.left = this.#held(this.left, size.width * this.scale, canvas.width);
    this.top = this.#held(this.top, size.height * this.scale, canvas.height);
    context.imageSmoothingEnabled = this.scale < 3 * this.ratio;
    context.imageSmoothingQuality = "high";
    const edge = Math.round(this.divider * canvas.width);
    const part = (picture, from, to) => {
      if (!picture) return;
      context.save();
      context.beginPath();
      context.rect(from, 0, to - from, canvas.height);
      context.clip();
      context.drawImage(picture, this.left, this.top, size.width * this.scale, size.height * this.scale);
      context.restore();
    };
    part(this.before ?? this.after, 0, edge);
    part(this.after ?? this.before, edge, canvas.width);
    if (this.before && this.after) {
      for (const [colour, rim] of [["#000", this.ratio], ["#fff", 0]]) { // seen on bright and on dark pictures
        context.fillStyle = colour;
        context.fillRect(edge - this.ratio - rim, 0, 2 * (this.ratio + rim), canvas.height);
        context.beginPath();
        context.arc(edge, canvas.height / 2, 9 * this.ratio + rim, 0, 2 * Math.PI);
        context.fill();
      }
    }
    this.element.setAttribute("aria-valuenow", String(Math.round(100 * this.divider)));
  }

  #size() {
    return this.before ?? this.after;
  }

  #split(x) {
    this.divider = Math.min(1, Math.max(0, x / this.element.clientWidth));
    this.draw();
  }

  #zoom(factor, x = this.element.clientWidth / 2, y = this.element.clientHeight / 2) {
    if (!this.#size()) return;
    const scale = Math.min(Math.max(this.whole, LARGEST * this.ratio), Math.max(this.whole, this.scale * factor)), change = scale / this.scale;
    this.left = x * this.ratio - (x * this.ratio - this.left) * change;
    this.top = y * this.ratio - (y * this.ratio - this.top) * change;
    this.scale = scale;
    this.draw();
  }

  #pan(dx, dy) {
    this.left += dx * this.ratio;
    this.top += dy * this.ratio;
    this.draw();
  }

  // One pointer moves the divider when it starts near it and pans elsewhere; two pinch.
  #down(event) {
    if (event.button) return;
    this.element.setPointerCapture(event.pointerId);
    const edge = this.divider * this.element.clientWidth;
    const splits = Math.abs(event.offsetX - edge) < 32;
    this.pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY, splits });
    if (splits) this.#split(event.offsetX);
  }

  #move(event) {
    const old = this.pointers.get(event.pointerId);
    const edge = this.divider * this.element.clientWidth;
    this.element.style.cursor = old?.splits || Math.abs(event.offsetX - edge) < 32 ? "ew-resize" : "grab";
    if (!old) return;
    const now = { ...old, x: event.offsetX, y: event.offsetY };
    if (this.pointers.size === 2) {
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1];
      const spread = point => Math.hypot(point.x - other.x, point.y - other.y) || 1;
      this.#zoom(spread(now) / spread(old), other.x, other.y);
    } else if (old.splits) {
      this.#split(now.x);
    } else {
      this.#pan(now.x - old.x, now.y - old.y);
    }
    this.pointers.set(event.pointerId, now);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const arrow = arrows[event.key];
    if (arrow && event.shiftKey) this.#pan(-40 * arrow[0], -40 * arrow[1]);
    else if (arrow) this.#split((this.divider + 0.02 * (arrow[0] - arrow[1])) * this.element.clientWidth);
    else if (event.key === "Home") this.#split(0);
    else if (event.key === "End") this.#split(this.element.clientWidth);
    else if (event.key === "+" || event.key === "=") this.#zoom(1.25);
    else if (event.key === "-") this.#zoom(0.8);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }
}
