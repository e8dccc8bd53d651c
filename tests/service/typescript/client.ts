// Submits a job, waits for it, and downloads its image and its archive, through a generated client.
// Prints the result as JSON. The service's address is in SERVICE.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type Job = components["schemas"]["JobView"];

declare const process: { env: Record<string, string | undefined> };

const client = createClient<paths>({ baseUrl: process.env.SERVICE ?? "" });

async function submit(): Promise<Job> {
  const { data, error } = await client.POST("/v1/jobs", {
    body: { model: "demo", prompts: ["a red circle", { prompt: "a blue heart", seed: 7 }] },
  });
  if (error) throw new Error(error.detail);
  return data;
}

async function finished(id: string): Promise<Job> {
  for (;;) {
    const { data, error } = await client.GET("/v1/jobs/{job_id}", {
      params: { path: { job_id: id }, query: { wait: 10 } },
    });
    if (error) throw new Error(error.detail);
    if (data && data.finished !== null) return data;
  }
}

const job = await finished((await submit()).id);
const image = await client.GET("/v1/jobs/{job_id}/images/{index}", {
  params: { path: { job_id: job.id, index: 1 } },
  parseAs: "arrayBuffer",
});
const archive = await client.GET("/v1/jobs/{job_id}/images.zip", {
  params: { path: { job_id: job.id } },
  parseAs: "blob",
});
const missing = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id: "none" } } });
const result = {
  state: job.state,
  sizes: job.images.map((item) => item.size),
  image: image.data?.byteLength,
  archive: archive.data?.size,
  missing: missing.error?.status,
};
console.log(JSON.stringify(result));
