// The grid of a job's images. Only tiles in or near the viewport are elements, however many images
// there are; arrow keys move between them. Works on images and elements; doesn't know the job.

import { make, say } from "./dom.js";
import { imagePath, thumbnailPath } from "./api.js";
import { Picture } from "./picture.js";

const GAP = 12, CAPTION = 46, WIDEST = 210, NARROWEST = 146;
const WORDS = {
  queued: "Queued",
  running: "Starting",
  failed: "Failed",
  cancelled: "Cancelled",
  succeeded: "",
};

export class Gallery {
  /** `scroller` scrolls, `list` contains the tiles, `open(index)` is called when one is clicked. */
  constructor(scroller, list, open) {
    this.scroller = scroller;
    this.list = list;
    this.open = open;
    this.tiles = new Map(); // index -> tile
    this.jobId = null;
    this.images = [];
    this.filter = "all";
    this.shown = []; // indexes that pass the filter, in order
    this.active = 0; // position in `shown` of the tile that Tab focuses
    this.columns = 1;
    scroller.addEventListener("scroll", () => this.#soon(), { passive: true });
    new ResizeObserver(() => this.#soon()).observe(list);
    list.addEventListener("keydown", (event) => this.#onKey(event));
  }

  show(jobId, images, filter = this.filter) {
    if (jobId !== this.jobId || filter !== this.filter) {
      if (jobId !== this.jobId) this.#clear();
      this.active = 0;
      this.scroller.scrollTop = 0;
    }
    Object.assign(this, { jobId, images, filter });
    this.shown = [];
    for (const image of images) if (passes(image, filter)) this.shown.push(image.index);
    this.active = Math.min(this.active, Math.max(0, this.shown.length - 1));
    this.#render();
  }

  /** Indexes of the running images in the viewport. */
  runningInView() {
    const { top, bottom } = this.scroller.getBoundingClientRect();
    return [...this.tiles.keys()].filter((index) => {
      if (this.images[index]?.state !== "running") return false;
      const box = this.tiles.get(index).item.getBoundingClientRect();
      return box.height > 0 && box.bottom > top && box.top < bottom;
    });
  }

  preview(jobId, index, blob) {
    if (jobId === this.jobId && this.images[index]?.state === "running") {
      this.tiles.get(index)?.picture.preview(blob);
    }
  }

  /** Focus an image, and scroll to it if necessary. */
  focus(index) {
    const place = this.shown.indexOf(index);
    if (place < 0) return;
    this.active = place;
    const top = this.list.offsetTop + Math.floor(place / this.columns) * this.rowHeight;
    const { scrollTop, clientHeight } = this.scroller;
    const head = parseFloat(getComputedStyle(this.scroller).scrollPaddingTop) || 0;
    if (top - head < scrollTop) {
      this.scroller.scrollTop = top - head;
    } else if (top + this.rowHeight > scrollTop + clientHeight) {
      this.scroller.scrollTop = top + this.rowHeight - clientHeight;
    }
    this.#render();
    this.tiles.get(index)?.button.focus({ preventScroll: true });
  }

  /** The index `by` positions away from another one among those shown; null beyond the ends. */
  neighbor(index, by) {
    return this.shown[this.shown.indexOf(index) + by] ?? null;
  }

  #soon() {
    this.pending ??= requestAnimationFrame(() => this.#render());
  }

  #render() {
    cancelAnimationFrame(this.pending);
    this.pending = null;
    const width = this.list.clientWidth;
    if (!width) return;
    this.columns = Math.max(2, Math.ceil((width + GAP) / (WIDEST + GAP)));
    while (this.columns > 2 && this.#side(width) < NARROWEST) this.columns -= 1;
    const side = (this.side = this.#side(width));
    this.rowHeight = side + CAPTION + GAP;
    this.list.style.height = `${Math.ceil(this.shown.length / this.columns) * this.rowHeight}px`;
    const visible = new Set(this.#inReach());
    const focused = [...this.tiles].find(([, tile]) => tile.button === document.activeElement)?.[0];
    if (focused !== undefined && passes(this.images[focused], this.filter)) visible.add(focused);
    for (const [index, tile] of this.tiles) {
      if (visible.has(index)) continue;
      tile.picture.clear();
      tile.item.remove();
      this.tiles.delete(index);
    }
    for (const index of [...visible].sort((a, b) => a - b)) this.#place(index, side);
  }

  #side(width) {
    return (width - GAP * (this.columns - 1)) / this.columns;
  }

  #inReach() {
    const { scrollTop, clientHeight } = this.scroller;
    const above = scrollTop - this.list.offsetTop;
    const first = Math.max(0, Math.floor(above / this.rowHeight) - 1);
    const last = Math.ceil((above + clientHeight) / this.rowHeight) + 1;
    return this.shown.slice(first * this.columns, last * this.columns);
  }

  #place(index, side) {
    const place = this.shown.indexOf(index);
    let tile = this.tiles.get(index);
    if (!tile) {
      tile = this.#make(index);
      this.tiles.set(index, tile);
      const next = [...this.list.children].find((item) => Number(item.dataset.index) > index);
      this.list.insertBefore(tile.item, next ?? null);
    }
    const x = (place % this.columns) * (side + GAP);
    const y = Math.floor(place / this.columns) * this.rowHeight;
    tile.item.style.transform = `translate(${x}px, ${y}px)`;
    tile.item.style.width = `${side}px`;
    tile.item.ariaSetSize = this.shown.length;
    tile.item.ariaPosInSet = place + 1;
    tile.button.tabIndex = place === this.active ? 0 : -1;
    if (tile.image !== this.images[index]) this.#fill(tile, this.images[index]);
  }

  #make(index) {
    const img = make("img", { alt: "", decoding: "async", draggable: false });
    const word = make("span", { class: "tile-word" });
    const bar = make("span", { class: "tile-bar" });
    const prompt = make("span", { class: "tile-prompt" });
    const facts = make("span", { class: "tile-facts" });
    const frame = make("span", { class: "tile-frame" }, img, word, bar);
    const button = make("button", { type: "button", class: "tile" }, frame, prompt, facts);
    button.addEventListener("click", () => {
      this.active = this.shown.indexOf(index);
      this.open(index);
    });
    const item = make("li", { data: { index } }, button);
    return { item, button, word, bar, prompt, facts, picture: new Picture(img), image: null };
  }

  #fill(tile, image) {
    const { index, state, step, steps } = image;
    // Otherwise a stale preview would look like the result.
    if (state !== "succeeded" && state !== "running") tile.picture.clear();
    tile.image = image;
    tile.item.dataset.state = state;
    if (state === "succeeded") tile.picture.show(this.#pathOf(image));
    const isMoving = state === "running" && step > 0;
    say(tile.word, isMoving ? `${step} / ${steps}` : WORDS[state]);
    tile.bar.style.transform = `scaleX(${isMoving ? step / steps : 0})`;
    say(tile.prompt, image.prompt);
    const note = image.warnings.length ? " · see warning" : "";
    const facts = `#${index + 1} · seed ${image.seed}${note}`;
    say(tile.facts, state === "failed" ? image.error ?? "" : facts);
    tile.button.ariaLabel = `Image ${index + 1}, ${state}: ${image.prompt}`;
  }

  /** The smallest thumbnail that fills the tile; a small image is shown in its own size. */
  #pathOf({ index, width, height }) {
    const pixels = this.side * Math.min(2, devicePixelRatio);
    const thumbnail = pixels <= 256 ? 256 : 512;
    const isSmall = Math.max(width, height) <= thumbnail;
    return isSmall ? imagePath(this.jobId, index) : thumbnailPath(this.jobId, index, thumbnail);
  }

  #onKey(event) {
    const moves = {
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: this.columns,
      ArrowUp: -this.columns,
      PageDown: this.columns * 3,
      PageUp: -this.columns * 3,
    };
    const ends = { Home: 0, End: this.shown.length - 1 };
    const target = event.key in ends ? ends[event.key] : this.active + (moves[event.key] ?? NaN);
    if (Number.isNaN(target) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.focus(this.shown[Math.min(this.shown.length - 1, Math.max(0, target))]);
  }

  #clear() {
    for (const tile of this.tiles.values()) {
      tile.picture.clear();
      tile.item.remove();
    }
    this.tiles.clear();
  }
}

function passes(image, filter) {
  const isLost = image.state === "failed" || image.state === "cancelled";
  return filter === "all" || image.state === filter || (filter === "failed" && isLost);
}
