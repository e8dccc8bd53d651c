// Picks an image's fields, as named by the API. The server makes names.js from its own table.

import { PER_IMAGE, PER_JOB } from "./names.js";

const pick = (image, names) => Object.fromEntries(names.map((name) => [name, image[name]]));

export const imageFields = (image) => pick(image, PER_IMAGE);
export const jobFields = (image) => pick(image, PER_JOB);
