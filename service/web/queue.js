// The lists next to the gallery: jobs, newest first, and workers with their speed.

import { $, ago, make, plural, rate, say } from "./dom.js";
import { get, repeat } from "./api.js";
import { isFinished } from "./job.js";

const FIRST_JOBS = 30, PAGE = 200;

export class Queue {
  /** `first(jobs)` is called once with the first page, so that a job can be shown. */
  constructor(first) {
    this.first = first;
    this.rows = new Map();
    this.current = null;
    this.limit = FIRST_JOBS;
    this.missed = null; // the last updated job that was not in the list
    this.busy = true;
    // the longer the list, the less often it's polled
    const seconds = () => (this.busy ? 2 : 5) * Math.ceil(this.limit / PAGE);
    this.polls = repeat(seconds, () => this.#look());
    $("more-jobs").addEventListener("click", () => {
      this.limit *= 2;
      this.polls.now();
    });
  }

  mark(id) {
    this.current = id;
    for (const [key, row] of this.rows) {
      row.link.setAttribute("aria-current", key === id ? "true" : "false");
    }
  }

  /** Show a job's changes immediately, before the next poll. */
  update(job) {
    const row = this.rows.get(job.id);
    if (row) fill(row, job);
    else if (this.missed !== job.id) this.polls.now();
    this.missed = row ? null : job.id;
  }

  async #look() {
    const { jobs, isAll } = await newest(this.limit);
    this.busy = jobs.some((job) => !isFinished(job.state));
    const ids = new Set(jobs.map((job) => job.id));
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue;
      row.item.remove();
      this.rows.delete(id);
    }
    jobs.forEach((job, place) => {
      const row = this.rows.get(job.id) ?? this.#add(job.id);
      const there = $("jobs").children[place];
      if (there !== row.item) $("jobs").insertBefore(row.item, there ?? null);
      fill(row, job);
    });
    $("more-jobs").hidden = isAll;
    $("no-jobs").hidden = jobs.length > 0;
    this.first?.(jobs);
    this.first = null;
  }

  #add(id) {
    const title = make("span", { class: "row-title" });
    const facts = make("span", { class: "row-facts" });
    const bar = make("span", { class: "row-bar" });
    const dot = make("span", { class: "dot" });
    const track = make("span", { class: "row-track" }, bar);
    const link = make("a", { href: `#job/${id}`, class: "row" }, dot, title, facts, track);
    link.setAttribute("aria-current", id === this.current ? "true" : "false");
    const row = { item: make("li", {}, link), link, title, facts, bar };
    this.rows.set(id, row);
    return row;
  }
}

/** The newest jobs, up to `total`, in as many pages as necessary. */
async function newest(total) {
  const jobs = [];
  let next = "";
  do {
    const limit = Math.min(PAGE, total - jobs.length);
    const cursor = next && `&cursor=${encodeURIComponent(next)}`;
    const page = await get(`v1/jobs?limit=${limit}${cursor}`);
    jobs.push(...page.data);
    next = page.next;
  } while (next !== null && jobs.length < total);
  return { jobs, isAll: next === null };
}

function fill(row, job) {
  const { counts, state } = job;
  row.link.dataset.state = state;
  row.named ||= Boolean(job.images?.length); // the list has no prompts, so keep a known title
  if (job.images?.length || !row.named) say(row.title, titleOf(job));
  const bad = ["failed", "cancelled"]
    .map((name) => (counts[name] ? `, ${counts[name]} ${name}` : ""))
    .join("");
  const done = `${counts.succeeded} of ${bad ? counts.total + bad : plural(counts.total, "image")}`;
  const word = isFinished(state) ? ago(job.created) : state;
  say(row.facts, `${state === "succeeded" ? plural(counts.total, "image") : done} · ${word}`);
  row.bar.style.transform = `scaleX(${job.progress})`;
}

/** A job's display name: its own title, its first prompt, or its model and the end of its id. */
export function titleOf(job) {
  const title = job.metadata?.title;
  if (typeof title === "string" && title) return title;
  return job.images?.[0]?.prompt ?? `${job.model} · ${job.id.slice(-8)}`;
}

/** Keep the list of workers up to date, and pass the models to `onModels`. */
export function watchWorkers(onModels) {
  repeat(() => 3, async () => {
    const [workers, models] = await Promise.all([get("v1/workers"), get("v1/models")]);
    onModels(models.data);
    const ready = workers.data.filter((worker) => worker.state === "ready");
    const speed = ready.reduce((sum, worker) => sum + (worker.steps_per_second ?? 0), 0);
    const queued = models.data.reduce((sum, model) => sum + model.queued, 0);
    const parts = [ready.length ? plural(ready.length, "worker") : "No worker ready"];
    if (queued) parts.push(`${queued.toLocaleString("en")} queued`);
    say($("health-text"), parts.join(" · "));
    say($("health-speed"), speed ? `\u00a0· ${rate(speed)} steps/s` : "");
    $("health").dataset.state = ready.length ? "ready" : "failed";
    $("no-workers").hidden = workers.data.length > 0;
    $("workers").replaceChildren(...workers.data.map(workerItem));
  });
}

function workerItem(worker) {
  const { steps_per_second } = worker;
  const speed = steps_per_second ? `${rate(steps_per_second)} steps/s` : "not measured yet";
  const activity = worker.in_flight ? `${worker.in_flight} in flight` : worker.state;
  const facts = [worker.device, worker.placement, activity];
  return make("li", { class: "worker", data: { state: worker.state } },
    make("span", { class: "dot" }),
    make("span", { class: "row-title" }, worker.model ?? worker.id),
    make("span", { class: "worker-speed" }, speed),
    make("span", { class: "row-facts" }, facts.filter(Boolean).join(" · ")),
    ...(worker.error ? [make("span", { class: "error" }, worker.error)] : []));
}

