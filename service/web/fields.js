// The fields of an image request, as the API names them. tests/test_fields.py compares them.

/** Fields in which the images of one job may differ. */
const PER_IMAGE = ["prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "seed"];

/** Fields that a job has once for all its images. */
const PER_JOB = ["format", "reproducible"];

const pick = (image, names) => Object.fromEntries(names.map((name) => [name, image[name]]));

export const imageFields = (image) => pick(image, PER_IMAGE);
export const jobFields = (image) => pick(image, PER_JOB);
