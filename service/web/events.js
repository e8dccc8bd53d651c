// Reads a Server-Sent Events stream with fetch, because EventSource can't send an API key.

import { ask } from "./api.js";

/**
 * Call `onFrame(type, data)` for every frame until the server ends the stream or `signal` aborts.
 * Resolves to the id of the last frame, with which the stream can be resumed.
 */
export async function follow(path, lastId, signal, onFrame) {
  const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
  const response = await ask(path, { headers, signal, cache: "no-store" });
  if (response.status === 204) return { lastId, over: true };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const frame = parse(block);
        if (frame.id) lastId = frame.id;
        if (frame.data) onFrame(frame.event, frame.data);
      }
    }
  } catch (error) {
    if (error.name !== "TypeError") throw error; // the connection broke; the caller resumes
  }
  return { lastId, over: false };
}

function parse(block) {
  const frame = { event: "message", data: "", id: null };
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "data") frame.data += value;
    else if (field === "event" || field === "id") frame[field] = value;
  }
  return frame;
}
