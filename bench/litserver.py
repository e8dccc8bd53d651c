"""`python -m bench.litserver`: LitServe around plain diffusers, as its users write it.

It has one process with the pipeline and one for HTTP. With a batch size above 1, requests that
arrive together share a pipeline call. A call has one number of steps, so a batch with different
steps is split into one call for each.
"""

import argparse
import base64
import io
from typing import Any

import litserve

BATCH_SECONDS = 0.05
"""How long a batch waits to be filled."""


class PlainDiffusers(litserve.LitAPI):  # type: ignore[misc]
    """Prompt, steps and seed in; a PNG in OpenAI's shape out."""

    def __init__(self, path: str, threads: int, guidance: float, **options: Any) -> None:
        super().__init__(api_path="/v1/images/generations", **options)
        self._path, self._threads, self._guidance = path, threads, guidance

    def setup(self, device: str) -> None:
        """Load the pipeline, in the one process that uses it."""
        import torch
        from diffusers import DiffusionPipeline

        self._generator = torch.Generator
        torch.set_num_threads(self._threads)
        self._pipe = DiffusionPipeline.from_pretrained(self._path, dtype=torch.float32)
        self._pipe.set_progress_bar_config(disable=True)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body as it is."""
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The inputs as a list."""
        return list(inputs)

    def predict(self, asked: Any) -> Any:
        """A picture for each request: one, or a list of them."""
        if isinstance(asked, dict):
            return self._pictures([asked])[0]
        pictures: list[Any] = [None] * len(asked)
        for steps in {body["steps"] for body in asked}:
            places = [place for place, body in enumerate(asked) if body["steps"] == steps]
            batch = self._pictures([asked[place] for place in places])
            for place, picture in zip(places, batch, strict=True):
                pictures[place] = picture
        return pictures

    def unbatch(self, output: list[Any]) -> list[Any]:
        """The outputs as they are."""
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        """The picture as base64 of a PNG."""
        file = io.BytesIO()
        output.save(file, "PNG")
        return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}

    def _pictures(self, asked: list[dict[str, Any]]) -> list[Any]:
        first = asked[0]
        width, height = map(int, first["size"].split("x"))
        pictures: list[Any] = self._pipe(
            prompt=[body["prompt"] for body in asked],
            negative_prompt=[""] * len(asked),
            true_cfg_scale=self._guidance,
            num_inference_steps=first["steps"],
            width=width,
            height=height,
            max_sequence_length=77,
            generator=[self._generator().manual_seed(body["seed"]) for body in asked],
        ).images
        return pictures


def main() -> None:
    """Serve until the process is stopped."""
    parser = argparse.ArgumentParser(prog="python -m bench.litserver", description=__doc__)
    parser.add_argument("--path", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--guidance", type=float, required=True)
    args = parser.parse_args()
    batching = {"max_batch_size": args.batch, "batch_timeout": BATCH_SECONDS}
    api = PlainDiffusers(
        args.path, args.threads, args.guidance, **(batching if args.batch > 1 else {})
    )
    server = litserve.LitServer(api, accelerator="cpu", devices=1, timeout=False)
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
