// The form: prompts and settings in, a job out. The server's errors are shown at their fields.

import { $, announce, plural, say } from "./dom.js";
import { Problem, submit } from "./api.js";
import { imageFields, jobFields } from "./fields.js";

const SHAPES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
const FIELDS = {
  width: "size",
  height: "size",
  n: "copies",
  guidance_scale: "guidance",
  negative_prompt: "negative",
};
const NUMBERS = {
  steps: "Steps",
  seed: "Seed",
  copies: "Copies",
  guidance: "Guidance",
  width: "Width",
  height: "Height",
};
const TITLE_LENGTH = 80;

export class Composer {
  /** `submitted(job)` is called with the server's response. */
  constructor(submitted) {
    this.submitted = submitted;
    this.models = [];
    this.form = $("compose");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.form.addEventListener("input", (event) => {
      clearError(fieldOf(event.target.id));
      this.#count();
    });
    $("model").addEventListener("change", () => this.#useModel());
    $("size").addEventListener("change", () => {
      $("custom-size").hidden = $("size").value !== "custom";
    });
  }

  get model() {
    return this.models.find((model) => model.id === $("model").value);
  }

  /** Update the catalog; the fields are only reset if the model or its defaults have changed. */
  setModels(models) {
    const isNew = namesOf(models) !== namesOf(this.models);
    const before = JSON.stringify(this.model?.defaults);
    this.models = models;
    if (isNew) {
      const chosen = $("model").value;
      $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
      if (models.some((model) => model.id === chosen)) $("model").value = chosen;
      this.#useModel();
    } else if (JSON.stringify(this.model?.defaults) !== before) {
      this.#useModel();
    }
    const isAlone = this.model?.ready_workers === 0;
    const noWorker = "No worker is ready for this model. Images will wait in the queue.";
    say($("model-note"), isAlone ? noWorker : "");
    const guidance = this.model?.card?.guidance;
    $("negative").disabled = guidance === "embedded" || guidance === "none";
    $("negative").placeholder = $("negative").disabled
      ? "Not supported by this model"
      : "What the image shouldn't show";
  }

  /** Put an image's settings into the form. */
  fill(image, model) {
    if (this.models.some(({ id }) => id === model) && $("model").value !== model) {
      $("model").value = model;
      this.#useModel();
    }
    $("prompts").value = image.prompt.replaceAll("\n", " ");
    this.#setSize(image.width, image.height);
    $("steps").value = image.steps;
    $("seed").value = image.seed;
    $("copies").value = 1;
    $("guidance").value = image.guidance_scale;
    $("negative").value = image.negative_prompt ?? "";
    $("format").value = image.format;
    $("reproducible").checked = image.reproducible;
    const isUnusual = image.format !== "png" || !image.reproducible;
    $("more").open ||= Boolean(image.negative_prompt) || isUnusual;
    this.#count();
    $("prompts").focus();
  }

  #useModel() {
    const { defaults, limits, card } = this.model;
    const grid = card?.multiple ?? limits.multiple;
    const sizes = limits.sizes.length ? limits.sizes : shapes(defaults, limits, grid);
    const options = sizes.map((size) => new Option(size.replace("x", " × "), size));
    if (!limits.sizes.length) options.push(new Option("Other…", "custom"));
    $("size").replaceChildren(...options);
    for (const side of ["width", "height"]) $(side).step = grid;
    this.#setSize(defaults.width, defaults.height);
    $("steps").value = defaults.steps ?? "";
    $("guidance").value = defaults.guidance_scale ?? "";
    this.#count();
  }

  #setSize(width, height) {
    const size = `${width}x${height}`;
    const isListed = [...$("size").options].some((option) => option.value === size);
    $("size").value = isListed ? size : "custom";
    $("custom-size").hidden = isListed;
    $("width").value = width ?? "";
    $("height").value = height ?? "";
  }

  #count() {
    const prompts = lines().length;
    const images = prompts * (Number($("copies").value) || 1);
    say($("prompt-count"), prompts ? plural(prompts, "prompt") : "One prompt per line");
    say($("submit"), images > 1 ? `Generate ${plural(images, "image")}` : "Generate");
  }

  #body() {
    const entries = lines();
    const custom = $("size").value === "custom";
    const [width, height] = custom
      ? [number("width"), number("height")]
      : $("size").value.split("x").map(Number);
    return {
      model: $("model").value,
      prompts: entries.map((line) => line.text),
      width,
      height,
      steps: number("steps"),
      seed: number("seed"),
      n: number("copies"),
      guidance_scale: number("guidance"),
      negative_prompt: $("negative").disabled ? undefined : $("negative").value.trim() || undefined,
      priority: Number($("priority").value),
      format: $("format").value,
      reproducible: $("reproducible").checked,
      metadata: { title: [...entries[0].text].slice(0, TITLE_LENGTH).join("") },
    };
  }

  async #submit() {
    if ($("submit").ariaDisabled === "true") return;
    const problems = this.#ownProblems();
    if (problems.length) return showProblems(problems);
    $("submit").ariaDisabled = "true";
    try {
      showProblems([]);
      const job = await submit(this.#body());
      announce(`Queued ${plural(job.counts.total, "image")}.`);
      this.submitted(job);
    } catch (error) {
      if (!(error instanceof Problem || error instanceof TypeError)) throw error;
      const unreachable = "Can't reach the server. Your prompts are still here: please try again.";
      const text = error instanceof Problem ? error.message : unreachable;
      showProblems(error.errors?.length ? error.errors : [{ pointer: "", detail: text }]);
    } finally {
      $("submit").ariaDisabled = "false";
    }
  }

  /** Problems that the page finds itself. */
  #ownProblems() {
    if (!lines().length) return [{ pointer: "/prompts", detail: "Enter at least one prompt." }];
    const bad = Object.keys(NUMBERS).find((id) => $(id).validity.badInput);
    return bad ? [{ pointer: `/${bad}`, detail: `${NUMBERS[bad]} must be a number.` }] : [];
  }
}

function namesOf(models) {
  return models.map((model) => model.id).join("\n");
}

/** The number in an input field; undefined if it's empty. */
function number(id) {
  return $(id).value.trim() === "" ? undefined : Number($(id).value);
}

/** The non-empty prompts, each with its line number. */
function lines() {
  const all = $("prompts").value.split("\n").map((text, line) => ({ text: text.trim(), line }));
  return all.filter(({ text }) => text);
}

/** Common aspect ratios with about as many pixels as the default size; none if that's unknown. */
function shapes({ width, height }, { max_pixels: most }, grid) {
  if (!width || !height) return [];
  const area = Math.min(width * height, most);
  const sizes = new Set([`${width}x${height}`]);
  for (const [across, down] of SHAPES) {
    const unit = Math.sqrt(area / (across * down));
    const sides = [across, down].map((side) => {
      return Math.max(grid, Math.floor((side * unit) / grid + 0.01) * grid);
    });
    if (sides[0] * sides[1] <= most) sizes.add(sides.join("x"));
  }
  return [...sizes];
}

const fieldOf = (name) => FIELDS[name] ?? name;

/** Show each problem at its field, or at the button if it has none, and focus the first field. */
function showProblems(problems) {
  for (const error of document.querySelectorAll("#compose .error")) clearError(error.dataset.for);
  const byField = new Map();
  for (const { pointer, detail } of problems) {
    const [, name = "", place] = pointer.split("/");
    const field = $(`${fieldOf(name)}-error`) ? fieldOf(name) : "form";
    const isPrompt = name === "prompts" && place !== undefined;
    const line = isPrompt ? lines()[Number(place)]?.line : undefined;
    const text = line === undefined ? detail : `Line ${line + 1}: ${detail}`;
    byField.set(field, [...(byField.get(field) ?? []), text]);
  }
  for (const [field, texts] of byField) {
    const more = texts.length > 3 ? [`and ${texts.length - 3} more`] : [];
    say($(`${field}-error`), [...texts.slice(0, 3), ...more].join("\n"));
    $(field)?.setAttribute("aria-invalid", "true");
  }
  const first = [...byField.keys()][0];
  if (!first || first === "form") return;
  $(first).closest("details")?.setAttribute("open", "");
  $(first).focus();
}

function clearError(field) {
  const error = $(`${field}-error`);
  if (error) say(error, "");
  $(field)?.removeAttribute("aria-invalid");
}

/** The request body that generates these images of a job again, with the same seeds. */
export function recipeOf(images, job) {
  const title = job.metadata.title ?? [...images[0].prompt].slice(0, TITLE_LENGTH).join("");
  return {
    model: job.model,
    prompts: images.map(imageFields),
    ...jobFields(images[0]),
    priority: job.priority,
    metadata: { title },
  };
}

