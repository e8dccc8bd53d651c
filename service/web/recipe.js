// The dialog of one image: in full size, with everything needed to reproduce it.

import { $, announce, copy, duration, make, say, toast } from "./dom.js";
import { get, imagePath, reasonOf } from "./api.js";
import { imageFields, jobFields } from "./fields.js";
import { download } from "./downloads.js";
import { Picture } from "./picture.js";

export class Recipe {
  /** `again(image)` queues the image again, `reuse(image)` fills its settings into the form. */
  constructor(gallery, { again, reuse }) {
    this.gallery = gallery;
    this.dialog = $("recipe");
    this.picture = new Picture($("recipe-image"));
    this.index = null;
    this.job = null;
    this.request = null; // the request for the current image's recipe, and its result
    this.dialog.addEventListener("close", () => this.#onClose());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") this.#go(1);
      if (event.key === "ArrowLeft") this.#go(-1);
    });
    $("recipe-next").addEventListener("click", () => this.#go(1));
    $("recipe-previous").addEventListener("click", () => this.#go(-1));
    $("recipe-again").addEventListener("click", () => again(this.image));
    $("recipe-reuse").addEventListener("click", () => {
      this.dialog.close();
      reuse(this.image_);
    });
    $("recipe-save").addEventListener("click", () => this.#save());
    $("recipe-copy").addEventListener("click", () => this.#copy());
  }

  get image() {
    return this.index === null ? null : this.job.images[this.index];
  }

  get runningIndex() {
    return this.image?.state === "running" ? this.index : null;
  }

  open(job, index) {
    this.job = job;
    this.picture.clear();
    this.index = index;
    this.request = null;
    this.update();
    if (!this.dialog.open) this.dialog.showModal();
  }

  preview(jobId, index, blob) {
    if (this.job?.id === jobId && this.runningIndex === index) this.picture.preview(blob);
  }

  /** Show the image's current state. */
  update() {
    const image = this.image;
    if (!image) return;
    this.image_ = image;
    const isMade = image.state === "succeeded";
    if (isMade) {
      this.picture.show(imagePath(this.job.id, image.index));
      this.request ??= this.#ask();
    } else if (image.state !== "running") {
      this.picture.clear();
    }
    $("recipe-image").alt = isMade ? image.prompt : "";
    this.dialog.dataset.state = image.state;
    say($("recipe-title"), `Image ${image.index + 1} of ${this.job.images.length}`);
    $("recipe-state").hidden = isMade;
    say($("recipe-word"), isMade ? "" : image.state);
    const isRunning = image.state === "running";
    say($("recipe-state"), isRunning ? `${image.step} of ${image.steps} steps` : image.state);
    say($("recipe-prompt"), image.prompt);
    $("recipe-error").hidden = !image.error;
    say($("recipe-error"), image.error ?? "");
    say($("recipe-warnings"), image.warnings.join("\n"));
    $("recipe-save").hidden = !isMade;
    // `disabled` would move the focus out of the dialog, and the arrow keys would stop working
    $("recipe-previous").ariaDisabled = String(this.gallery.neighbor(image.index, -1) === null);
    $("recipe-next").ariaDisabled = String(this.gallery.neighbor(image.index, 1) === null);
    this.#show(image);
  }

  #show(image) {
    const { recipe = null, problem = null } = this.request ?? {};
    const facts = [...factsOf(recipe ?? known(image, this.job.view)), ...factsOf(result(image))];
    const text = JSON.stringify(facts);
    if (text !== this.factsText) $("recipe-facts").replaceChildren(...rows(facts));
    this.factsText = text;
    const isComing = image.state === "queued" || image.state === "running";
    const later = "The rest of the recipe is available once the image is finished.";
    const waiting = isComing ? later : "";
    $("recipe-note").classList.toggle("error", problem !== null);
    const failure = `Couldn't load the rest of the recipe: ${problem}`;
    say($("recipe-note"), problem === null ? waiting : failure);
  }

  /** Fetch the recipe in the image's file; the result is stored in the returned object. */
  #ask() {
    const request = { recipe: null, problem: null };
    request.done = get(`${imagePath(this.job.id, this.index)}/recipe`)
      .then((recipe) => (request.recipe = recipe))
      .catch((error) => (request.problem = reasonOf(error)))
      .then(() => request === this.request && this.update());
    return request;
  }

  #go(by) {
    const next = this.gallery.neighbor(this.index, by);
    if (next !== null) this.open(this.job, next);
  }

  async #save() {
    const { index, media_type: type } = this.image;
    const suffix = { "image/jpeg": "jpg", "image/webp": "webp" }[type] ?? "png";
    try {
      await download(imagePath(this.job.id, index), `${this.job.id}-${index}.${suffix}`);
    } catch (error) {
      toast(error.message, true);
    }
  }

  /** Copy the recipe in the image's file as JSON; of an unfinished image, its known fields. */
  async #copy() {
    const button = $("recipe-copy"), { request, image } = this;
    try {
      await request?.done;
      const recipe = request?.recipe ?? known(image, this.job.view);
      await copy(JSON.stringify(recipe, null, 2), this.dialog);
      button.focus();
      say(button, request?.recipe ? "Copied" : "Partly copied");
      announce(request?.recipe ? "Recipe copied." : "Copied the known part of the recipe.");
      setTimeout(() => say(button, "Copy recipe"), 2000);
    } catch (error) {
      toast(error.message, true);
    }
  }

  #onClose() {
    const index = this.index;
    this.index = null;
    this.picture.clear();
    if (index !== null) this.gallery.focus(index);
  }
}

/** The fields of a recipe that are known in advance, by their names in the recipe. */
function known(image, { model }) {
  return { model, ...imageFields(image), ...jobFields(image) };
}

/** The image's result, which isn't part of its recipe. */
function result({ seconds, attempts, sha256 }) {
  return {
    generated_in: seconds === null ? null : duration(seconds),
    attempts: attempts > 1 ? attempts : null,
    "SHA-256": sha256,
  };
}

/** Pairs of name and text for all fields that are set, without those that are shown above. */
function factsOf({ prompt, warnings, ...recipe }) {
  const pairs = Object.entries(recipe);
  const facts = pairs.filter(([, value]) => value !== null && value !== "");
  return facts.map(([name, value]) => [titled(name), worded(value)]);
}

const titled = (name) => `${name[0].toUpperCase()}${name.slice(1).replaceAll("_", " ")}`;

function worded(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "object") return String(value);
  return Object.entries(value).map(([name, item]) => `${name} ${worded(item)}`).join("\n");
}

function rows(pairs) {
  return pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
}
