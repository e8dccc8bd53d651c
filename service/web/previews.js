// Fetches previews of the running images in the viewport, each at most once per second.

import { Problem, ask, imagePath, repeat } from "./api.js";

const AT_ONCE = 3, PER_ROUND = 8;

/**
 * Supply `gallery` and the open recipe with previews for as long as the page is open.
 * Returns `without(work)`, which runs `work` while no previews are requested, because previews of
 * images that are just being cancelled would fail.
 */
export function supply(gallery, recipe) {
  let held = false, round = Promise.resolve();
  const seen = new Map(); // index -> when it was last requested
  const fetchAll = async () => {
    const jobId = gallery.jobId;
    const running = new Set(gallery.runningInView());
    if (recipe.runningIndex !== null) running.add(recipe.runningIndex);
    const longest = [...running].sort((a, b) => (seen.get(a) ?? 0) - (seen.get(b) ?? 0));
    const todo = longest.slice(0, PER_ROUND);
    for (const index of seen.keys()) if (!running.has(index)) seen.delete(index);
    const fetchSome = async () => {
      for (let index; !held && (index = todo.shift()) !== undefined; ) {
        seen.set(index, performance.now());
        const blob = await fetchPreview(jobId, index);
        if (!blob) continue;
        gallery.preview(jobId, index, blob);
        recipe.preview(jobId, index, blob);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, fetchSome));
  };
  repeat(() => 1, () => (held ? undefined : (round = fetchAll())));
  return async (work) => {
    held = true;
    try {
      await round.catch(() => undefined);
      await work();
    } finally {
      held = false;
    }
  };
}

async function fetchPreview(jobId, index) {
  try {
    const response = await ask(`${imagePath(jobId, index)}/preview`, { cache: "no-store" });
    return response.status === 200 ? await response.blob() : null;
  } catch (error) {
    if (error instanceof Problem && error.status === 404) return null; // no preview yet
    throw error;
  }
}
