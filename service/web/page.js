// Puts the page together: form, queue, gallery, recipe, and the current job with its actions.

import { $, announce, confirmed, dismissToast, duration, plural, say, toast } from "./dom.js";
import { jobPath, post, reasonOf, remove, submit } from "./api.js";
import { Composer, recipeOf } from "./compose.js";
import { downloadArchive, downloadSheet, foldSheets, offerSheets } from "./downloads.js";
import { Gallery } from "./gallery.js";
import { Job, isFinished } from "./job.js";
import { supply } from "./previews.js";
import { Queue, titleOf, watchWorkers } from "./queue.js";
import { Recipe } from "./recipe.js";

const SAY_EVERY = 5000;
const TITLE = document.title;
let job = null;
let filter = "all";
let spoken = { at: 0, text: "" };

const composer = new Composer(show);
const gallery = new Gallery($("images"), $("gallery"), (index) => recipe.open(job, index));
const recipe = new Recipe(gallery, {
  again: (image) => runAgain([image]),
  reuse(image) {
    turnTo("create");
    composer.fill(image, job.view.model);
  },
});
const queue = new Queue((jobs) => {
  if (job === null && jobs.length) show(jobs[0], { quietly: true });
});
const withoutPreviews = supply(gallery, recipe);
watchWorkers((models) => composer.setModels(models));

/** Show a job; with `quietly`, a phone stays at the form. */
function show(view, { quietly = false } = {}) {
  if (!quietly) turnTo("images");
  if (location.hash !== `#job/${view.id}`) history.pushState(null, "", `#job/${view.id}`);
  open(view.id, view.images ? view : null);
}

function open(id, view = null) {
  job?.stop();
  filter = "all";
  spoken = { at: 0, text: "" };
  foldSheets();
  job = new Job(id, view);
  job.addEventListener("change", paint);
  job.addEventListener("gone", () => {
    toast("This job has been deleted.");
    close();
  });
  queue.mark(id);
  if (view) queue.update(view);
  if (view) paint();
}

function close() {
  job?.stop();
  job = null;
  history.replaceState(null, "", location.pathname + location.search);
  $("recipe").close();
  gallery.show(null, []);
  for (const id of ["job-head", "filters"]) $(id).hidden = true;
  $("welcome").hidden = false;
  queue.mark(null);
  queue.polls.now();
  document.title = TITLE;
  $("images").focus();
}

/** Update the page from the job. */
function paint() {
  const { view, images } = job;
  const { counts, state } = view;
  const isOver = isFinished(state);
  $("welcome").hidden = true;
  $("job-head").hidden = $("filters").hidden = false;
  $("job-head").dataset.state = state;
  say($("job-title"), titleOf({ ...view, images }));
  say($("job-state"), state);
  say($("job-facts"), factsOf(view));
  say($("job-warnings"), isOver ? "" : (view.warnings ?? []).join("\n"));
  $("job-bar").style.transform = `scaleX(${view.progress})`;
  $("job-progress").setAttribute("aria-valuenow", Math.round(view.progress * 100));
  $("save-all").hidden = counts.succeeded === 0;
  offerSheets(job.id, counts.succeeded);
  $("cancel").hidden = isOver;
  $("retry").hidden = !isOver || counts.failed + counts.cancelled === 0;
  $("again").hidden = $("delete").hidden = !isOver;
  keepFocus();
  for (const button of $("filters").children) paintFilter(button, counts);
  gallery.show(job.id, images, filter);
  recipe.update();
  queue.update(view);
  titleTab(view);
  const failed = counts.failed ? `, ${counts.failed} failed` : "";
  const done = `${counts.succeeded} of ${plural(counts.total, "image")} done${failed}.`;
  speak(done, isOver, state);
}

/** When the focused button disappears, focus the first visible one instead. */
function keepFocus() {
  const { activeElement } = document;
  if (!activeElement.hidden || !activeElement.closest("#job-head .actions")) return;
  document.querySelector("#job-head .actions > :not([hidden])").focus();
}

/** Show the progress in the tab's title, for users who switch to another tab. */
function titleTab({ state, counts, progress }) {
  const failed = `${counts.failed} failed`;
  const done = { succeeded: "Done", failed, cancelled: "Cancelled" }[state];
  document.title = `${done ?? `${Math.floor(progress * 100)} %`} · ${TITLE}`;
}

function paintFilter(button, counts) {
  const name = button.dataset.filter;
  const lost = counts.failed + counts.cancelled;
  const count = { all: counts.total, failed: lost }[name] ?? counts[name];
  say(button.lastElementChild, count.toLocaleString("en"));
  button.setAttribute("aria-pressed", name === filter ? "true" : "false");
  button.hidden = count === 0 && name !== "all" && name !== filter;
}

function factsOf(view) {
  const { counts, queue_position: position } = view;
  const done = counts.succeeded.toLocaleString("en");
  const parts = [view.model, `${done} of ${plural(counts.total, "image")}`];
  if (counts.failed) parts.push(`${counts.failed} failed`);
  if (isFinished(view.state)) {
    if (view.started && view.finished) parts.push(`took ${duration(view.finished - view.started)}`);
  } else if (view.state === "queued" && position !== null) {
    parts.push(position ? `${plural(position, "image")} ahead` : "next in line");
  } else if (job.eta !== null) {
    parts.push(`${duration(job.eta)} left`);
  }
  return parts.join(" · ");
}

/** Announce the progress to screen readers, but not too often. */
function speak(text, isOver, state) {
  const now = performance.now();
  const whole = isOver ? `Job ${state}: ${text}` : text;
  if (whole === spoken.text || (!isOver && now - spoken.at < SAY_EVERY)) return;
  spoken = { at: now, text: whole };
  announce(whole);
}

/** Run `work` when a button is clicked, and show its error, if any. */
function onClick(id, work) {
  $(id).addEventListener("click", async (event) => {
    try {
      await work(event);
    } catch (error) {
      toast(reasonOf(error), true);
    }
  });
}

async function runAgain(images) {
  const { view } = job;
  try {
    const next = await submit(recipeOf(images, view));
    $("recipe").close();
    show(next);
    toast(`Running again with the same ${images.length > 1 ? "seeds" : "seed"}.`);
  } catch (error) {
    toast(reasonOf(error), true);
  }
}

/** Keep focused images from being hidden under the sticky header. */
function clearHead() {
  const isSticky = getComputedStyle($("job-head")).position === "sticky";
  $("images").style.scrollPaddingTop = `${isSticky ? $("job-head").offsetHeight : 0}px`;
}
new ResizeObserver(clearHead).observe($("job-head"));

onClick("cancel", async () => {
  const of = job;
  await withoutPreviews(async () => of.accept(await post(`${jobPath(of.id)}/cancel`)));
  toast("Cancelled. Finished images are kept.");
});
onClick("retry", async () => {
  const of = job;
  of.accept(await post(`${jobPath(of.id)}/retry`));
});
onClick("again", () => runAgain(job.images));
onClick("save-all", () => downloadArchive(`${jobPath(job.id)}/images.zip`, `${job.id}.zip`));
onClick("sheets", () => foldSheets($("sheets").ariaExpanded === "true"));
onClick("delete", async () => {
  const of = job;
  if (!(await confirmed("Delete this job and its images? This can't be undone.", "Delete"))) return;
  await remove(jobPath(of.id));
  if (job === of) close();
  toast("Deleted the job and its images.");
});
onClick("toast-close", dismissToast);

for (const id of ["sheet", "sheet-list"]) {
  onClick(id, async (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    event.preventDefault();
    await downloadSheet(link, job.id);
  });
}

$("filters").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  filter = button.dataset.filter;
  paint();
});

/** Switch to one of the three parts; a phone only shows one at a time. */
function turnTo(part) {
  document.body.dataset.part = part;
  for (const tab of $("tabs").children) {
    tab.setAttribute("aria-current", tab.dataset.part === part ? "page" : "false");
  }
}

$("tabs").addEventListener("click", (event) => {
  const tab = event.target.closest("button");
  if (tab) turnTo(tab.dataset.part);
});
document.querySelector(".skip").addEventListener("click", () => turnTo("create"));
$("health").addEventListener("click", () => turnTo("queue"));
$("jobs").addEventListener("click", (event) => event.target.closest("a") && turnTo("images"));

function onHash() {
  const id = /^#job\/([\w-]+)$/.exec(location.hash)?.[1];
  if (id && id !== job?.id) open(id);
}
window.addEventListener("hashchange", onHash);
window.addEventListener("popstate", onHash);
turnTo("create");
onHash();
