// Fetches previews of the running images in view, each at most once a second.

import { Problem, ask, imagePath, repeat } from "./api.js";

const AT_ONCE = 3, PER_ROUND = 8;

/**
 * Keep `gallery`, and the open recipe, supplied with previews for as long as the page lives.
 * Returns `without(work)`: does something while no preview is asked for, such as to cancel what
 * the page still takes for running.
 */
export function supply(gallery, recipe) {
  let held = false, round = Promise.resolve();
  const seen = new Map(); // index -> when it was last asked for
  const fetchAll = async () => {
    const jobId = gallery.jobId;
    const wanted = new Set(gallery.runningInView());
    if (recipe.runningIndex !== null) wanted.add(recipe.runningIndex);
    const longest = [...wanted].sort((a, b) => (seen.get(a) ?? 0) - (seen.get(b) ?? 0));
    const todo = longest.slice(0, PER_ROUND);
    for (const index of seen.keys()) if (!wanted.has(index)) seen.delete(index);
    const one = async () => {
      for (let index; !held && (index = todo.shift()) !== undefined; ) {
        seen.set(index, performance.now());
        const blob = await fetchPreview(jobId, index);
        if (!blob) continue;
        gallery.preview(jobId, index, blob);
        recipe.preview(jobId, index, blob);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, one));
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
    if (error instanceof Problem && error.status === 404) return null; // nothing to see yet
    throw error;
  }
}
