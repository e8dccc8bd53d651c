// The fields of an image request, as named by the API. tests/test_fields.py checks this list.

/** Fields that may differ between the images of a job. */
const PER_IMAGE = [
  "prompt",
  "negative_prompt",
  "width",
  "height",
  "steps",
  "guidance_scale",
  "seed",
];

/** Fields that are the same for all images of a job. */
const PER_JOB = ["format", "reproducible"];

const pick = (image, names) => Object.fromEntries(names.map((name) => [name, image[name]]));

export const imageFields = (image) => pick(image, PER_IMAGE);
export const jobFields = (image) => pick(image, PER_JOB);
