// One job, kept up to date. Its event stream reports finished images; polling (with an ETag)
// reports the steps of running ones. Each poll makes the server build the whole list, so the longer
// a poll takes, the less often the page polls. Doesn't know the page's elements.

import { Problem, ask, jobPath, repeat } from "./api.js";
import { follow } from "./events.js";

const FINISHED = new Set(["succeeded", "failed", "cancelled"]);
const LOOK_SHARE = 20;

export const isFinished = (state) => FINISHED.has(state);

/** Fires `change` when the job or its images have changed, `gone` when the job was deleted. */
export class Job extends EventTarget {
  constructor(id, view = null) {
    super();
    this.id = id;
    this.view = view;
    this.images = view?.images ?? [];
    this.etaAt = performance.now();
    this.tag = null;
    this.updated = new Map(); // index -> time of its last event
    this.lookSeconds = 1;
    this.ending = new AbortController();
    this.following = false;
    this.looks = repeat(() => (this.isOver ? 15 : this.lookSeconds), () => this.#look());
  }

  get isOver() {
    return this.view !== null && isFinished(this.view.state);
  }

  /** Seconds until the last image, counted down since the server's response; null if unknown. */
  get eta() {
    const eta = this.view?.eta_seconds ?? null;
    return eta === null ? null : Math.max(0, eta - (performance.now() - this.etaAt) / 1000);
  }

  /** Use a response that is newer than all previous state, such as that of a cancel or retry. */
  accept(view) {
    this.updated.clear();
    this.#take(view, performance.now());
    this.looks.now();
  }

  stop() {
    this.ending.abort();
    this.looks.stop();
  }

  async #look() {
    const began = performance.now();
    const headers = this.tag ? { "If-None-Match": this.tag } : {};
    try {
      const { signal } = this.ending;
      const response = await ask(jobPath(this.id), { headers, cache: "no-store", signal });
      if (response.status !== 304) {
        this.tag = response.headers.get("ETag");
        this.#take(await response.json(), began);
        const took = (performance.now() - began) / 1000;
        this.lookSeconds = Math.min(10, Math.max(0.7, took * LOOK_SHARE));
      }
    } catch (error) {
      if (!(error instanceof Problem && error.status === 404)) throw error;
      this.stop();
      this.dispatchEvent(new Event("gone"));
      return;
    }
    this.#follow();
  }

  #take(view, asOf) {
    if (this.ending.signal.aborted) return;
    for (const [index, when] of this.updated) {
      if (when > asOf && this.images[index]) view.images[index] = this.images[index];
    }
    this.view = view;
    this.images = view.images;
    this.etaAt = performance.now();
    this.#changed();
  }

  async #follow() {
    if (this.following || this.isOver || this.ending.signal.aborted) return;
    this.following = true;
    try {
      let last = null, over = false;
      while (!over && !this.isOver && !this.ending.signal.aborted) {
        const report = (type, data) => this.#onEvent(type, data);
        const end = await follow(`${jobPath(this.id)}/events`, last, this.ending.signal, report);
        ({ lastId: last, over } = end);
      }
    } catch {
      // polling continues, and resumes the stream
    } finally {
      this.following = false;
    }
    if (!this.ending.signal.aborted) this.looks.now();
  }

  #onEvent(type, data) {
    const item = JSON.parse(data);
    if (type === "image") {
      this.images[item.index] = item;
      this.updated.set(item.index, performance.now());
    } else if (type === "job") {
      this.view = { ...this.view, ...item, images: this.images };
    } else if (type === "deleted") {
      this.stop();
      this.dispatchEvent(new Event("gone"));
      return;
    }
    this.#changed();
  }

  #changed() {
    if (this.scheduled) return;
    this.scheduled = true;
    // a hidden page gets no animation frames, but its title is still visible
    const soon = document.hidden ? (work) => setTimeout(work, 500) : requestAnimationFrame;
    soon(() => {
      this.scheduled = false;
      if (!this.ending.signal.aborted) this.dispatchEvent(new Event("change"));
    });
  }
}
