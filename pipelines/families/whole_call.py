"""Any other text-to-image pipeline of diffusers, one whole call at a time.

A step is a whole pipeline call for images of the same size, steps and guidance, so no image can
join midway. Their prompts must have the same number of tokens, because many pipelines pad to the
longest. If that can't be determined, or if the pipeline doesn't support batches, each image gets
its own call. Progress and cancellation use the pipeline's step callback.

Equals the pipeline's own call with its defaults, except that sizes are exact (no resolution
binning) and that video classes make a single frame. Passes only arguments that the pipeline's
`__call__` takes, and doesn't depend on what happens inside. The image is the one that the class
itself returns as PIL images, with its own conversion to 0..1, watermark and safety checker.
"""

import inspect
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import structlog
import torch

from jobs.errors import ImageFailed, ModelUnavailable
from jobs.request import ImageRequest
from pipelines import batch
from pipelines.draws import Draws, global_states
from pipelines.families.family import REFUSED, Role
from pipelines.families.whole_classes import (
    MISCALLING,
    NEGATIVE_NEEDED,
    frames_argument,
    refusal,
)
from pipelines.families.whole_output import pictures, refused
from pipelines.families.whole_text import PromptTexts
from pipelines.loading.packages import missing_packages
from pipelines.out_of_memory import is_out_of_memory
from pipelines.pixels import check_pixels
from pipelines.seam import Card, Conditioning, Sample

log = structlog.get_logger(__name__)


class _AllCancelledError(Exception):
    """All images of the running call have been cancelled."""


class _DrawsGloballyError(Exception):
    """The pipeline draws from torch's global generator, so batches aren't reproducible."""


class WholeCall:
    """A DiffusionPipeline behind the seam; `extra["pixels"]` of a finished sample is its image.

    `batches` is whether a call supports several images; None until the first try. `draws` is
    whether a call has drawn from torch's global generator; from then on each image gets its own
    call with its own random numbers.
    """

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.name = type(pipe).__name__
        self.length = max_sequence_length
        if sentence := refusal(type(pipe)):
            raise ModelUnavailable(sentence)
        self.takes = frozenset(inspect.signature(pipe.__call__).parameters)
        self.frames = frames_argument(type(pipe))
        # As for Flux: without embedded guidance, guidance_scale means the true CFG scale.
        self.true_cfg = "true_cfg_scale" in self.takes and not _has_embedded_guidance(pipe)
        self.prompts = PromptTexts(pipe, max_sequence_length)
        self.batches: bool | None = None if self.prompts.comparable else False
        self.draws = False
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}  # requested -> returned
        self._card = Card(
            family="whole_call",
            multiple=_grid(pipe),
            guidance=self._guidance_kind(),
            joins=False,
            max_prompt_tokens=self.prompts.limit,
            scheduler=type(getattr(pipe, "scheduler", None)).__name__,
            prompt=self.prompts.form,
            guides_above=0.0,  # from outside only a scale of 0 is certain to turn it off
        )

    @property
    def card(self) -> Card:
        """What the model is, with `sizes` once a call has returned another size than requested."""
        exact = sorted(size for size, returned in self._sizes.items() if size == returned)
        if len(exact) == len(self._sizes):
            return self._card
        return replace(self._card, sizes=tuple(exact))

    def tokenizer_json(self) -> str | None:
        """The pipeline's only tokenizer as JSON; None if it has several or changes the text."""
        return self.prompts.tokenizer_json()

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Everything that a pipeline call takes once; the request itself if it runs alone."""
        if self.batches is False:
            return request
        has_negative = request.negative_prompt is not None
        size = request.width, request.height
        return size, request.steps, request.guidance_scale, has_negative, self.prompts.key(request)

    def rows(self, request: ImageRequest) -> int:
        """Two with classifier-free guidance, as far as can be told from outside."""
        guided = self.card.guidance == "classifier-free" and request.guidance_scale > 1
        return 2 if guided else 1

    def tokens(self, request: ImageRequest) -> int:
        """Cells of the model's size grid."""
        return (request.width // self.card.multiple) * (request.height // self.card.multiple)

    def texts(self, request: ImageRequest) -> Mapping[Role, str | None]:
        """The prompts, only to find out whether they're too long."""
        texts: dict[Role, str | None] = {"positive": request.prompt}
        if request.negative_prompt is not None:
            texts["negative"] = request.negative_prompt
        return texts

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """No tensors, because the call encodes prompts itself; only whether the text is cut."""
        return Conditioning({}, truncated=self.prompts.truncated(text or ""))

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample without latents; its steps are the request's.

        Raises ImageFailed for a size that the pipeline is known to change.
        """
        size = request.width, request.height
        if self._sizes.get(size, size) != size:
            raise ImageFailed(self._changed_size(size))
        return Sample(request, conditioning, None, None, request.steps)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """Run the whole call. Returns early, without images, if all samples are cancelled.

        Makes one call per image if the pipeline doesn't support more; then `bucket` is ignored, so
        that each image is always made alone.
        """
        rows = batch.padded(samples, bucket)
        try:
            if len(rows) == 1:
                self._call(samples, rows)
            elif self.batches is False:
                self._call_each(samples)
            elif self.batches:
                self._call(samples, rows)
            else:
                self._try_batch(samples, rows)
        except _DrawsGloballyError:
            self.batches = False
            self._call_each(samples)

    def _try_batch(self, samples: Sequence[Sample], rows: Sequence[Sample]) -> None:
        """Try the first batch, then single calls if it fails, and remember which of them works.

        The pipeline doesn't support batches if the batch fails but each of its images succeeds
        alone.
        """
        try:
            self._call(samples, rows)
        except (torch.AcceleratorError, _DrawsGloballyError):
            raise
        except Exception as error:  # pipelines fail on batches in many ways
            if is_out_of_memory(error):
                raise
            batch_error = error
        else:
            self.batches = all(s.done for s in samples) or None
            return
        try:
            self._call_each(samples)
        except Exception:
            for sample in samples:
                _undo(sample)
            raise batch_error from None
        if all(sample.done for sample in samples):  # none was cancelled
            self.batches = False
            log.warning("no batches", pipeline=self.name, reason=str(batch_error))

    def _call_each(self, samples: Sequence[Sample]) -> None:
        """One call per sample; if one fails, those before it are finished."""
        for sample in samples:
            if not sample.done:
                self._call([sample], [sample])

    def _call(self, samples: Sequence[Sample], rows: Sequence[Sample]) -> None:
        """One call for all rows; the samples are the first of them."""
        requests = [row.request for row in rows]
        try:
            output = self._run(samples, requests)
            verdicts = refused(output, len(rows))
            images = pictures(output, self.name, len(rows))
            for sample, image, verdict in zip(samples, images, verdicts, strict=False):
                self._finish(sample, image, verdict)
        except BaseException as error:
            self.pipe.maybe_free_model_hooks()  # as at the end of a call, to empty its caches
            if isinstance(error, _AllCancelledError):
                return
            for sample in samples:
                _undo(sample)
            raise

    def _run(self, samples: Sequence[Sample], requests: Sequence[ImageRequest]) -> Any:
        """The pipeline's output, whose bits depend only on the requests.

        Raises _DrawsGloballyError if a call for several draws from torch's global generator.
        """
        arguments = {**self._arguments(requests), **self._callback(samples)}
        if not self.draws:
            before = global_states()
            output = self._converted(arguments)
            if global_states() == before:
                return output
        if len(requests) > 1:
            raise _DrawsGloballyError
        for sample in samples:
            _undo(sample)
        draws = Draws(requests[0].seed)
        with draws:
            # A fresh generator, because the first call has advanced its own.
            output = self._converted(arguments | self._generator(requests))
        if draws.count and not self.draws:
            self.draws, self.batches = True, False
            log.info("draws from the global generator: one image per call", pipeline=self.name)
        return output

    def _converted(self, arguments: dict[str, Any]) -> Any:
        """Call the pipeline. If it makes 8-bit images itself, NaN must not become black."""
        as_bytes = arguments.get("output_type") == "pil"
        with np.errstate(invalid="raise") if as_bytes else nullcontext():
            try:
                return self.pipe(**arguments)
            except FloatingPointError as error:
                raise ImageFailed("the pixels are NaN or infinite") from error
            except (NameError, ImportError) as error:
                if sentence := missing_packages(error):
                    raise ModelUnavailable(f"{self.name}: {sentence}") from error
                raise

    def decode(self, sample: Sample) -> torch.Tensor:
        """The pixels that the call returned."""
        if "pixels" not in sample.extra:
            raise ImageFailed("the pipeline call hasn't finished")
        pixels: torch.Tensor = sample.extra["pixels"]
        return pixels

    def _arguments(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        first = requests[0]
        arguments: dict[str, Any] = {
            "prompt": _one_or_list([r.prompt for r in requests]),
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.steps,
            # Every class converts "np" the way it converts its images, which isn't true of "pt".
            # Classes with a watermarker add the watermark only to "pil".
            "output_type": "np" if getattr(self.pipe, "watermarker", None) is None else "pil",
            # Two ways to request the exact size.
            "use_resolution_binning": False,
            "max_area": first.width * first.height,
            **self._generator(requests),
        }
        arguments["guidance_schedule"] = None  # classes with it refuse a scale next to its default
        arguments["true_cfg_scale" if self.true_cfg else "guidance_scale"] = first.guidance_scale
        if self.frames:
            arguments[self.frames] = 1
        if self.length is not None:
            arguments["max_sequence_length"] = self.length
        needs_negative = self.true_cfg or self.name in NEGATIVE_NEEDED
        if needs_negative or first.negative_prompt is not None:
            negatives = [r.negative_prompt or "" for r in requests]
            arguments["negative_prompt"] = _one_or_list(negatives)
        return {name: value for name, value in arguments.items() if name in self.takes}

    def _generator(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """A single generator for a single image, because some pipelines don't take lists."""
        if "generator" not in self.takes:
            return {}
        return {"generator": _one_or_list([batch.seeded(r) for r in requests])}

    def _callback(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Arguments that make the call report each step, by the current API or the older one."""

        def on_step_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            self._report(samples, index)
            return {}

        def on_step(index: int, timestep: Any, latents: Any) -> None:
            self._report(samples, index)

        if self.name in MISCALLING:
            return {}
        if "callback_on_step_end" in self.takes:
            return {"callback_on_step_end": on_step_end}
        if {"callback", "callback_steps"} <= self.takes:
            return {"callback": on_step, "callback_steps": 1}
        return {}

    def _report(self, samples: Sequence[Sample], index: int) -> None:
        if all(s.cancelled for s in samples):
            raise _AllCancelledError
        for sample in samples:
            # A second-order scheduler has more timesteps than the request has steps.
            total = max(getattr(self.pipe, "num_timesteps", 0), sample.steps)
            sample.step = min((index + 1) * sample.steps // total, sample.steps)

    def _finish(self, sample: Sample, image: torch.Tensor, verdict: bool) -> None:
        sample.step = sample.steps
        size = (sample.request.width, sample.request.height)
        self._sizes[size] = (image.shape[-1], image.shape[-2])
        if verdict:
            sample.error = REFUSED
        elif self._sizes[size] != size:
            sample.error = self._changed_size(size)
        else:
            try:
                check_pixels(image)
            except ImageFailed as error:
                sample.error = str(error)
            else:
                sample.extra["pixels"] = image

    def _changed_size(self, size: tuple[int, int]) -> str:
        returned = "x".join(map(str, self._sizes[size]))
        return f"{self.name} returned {returned} pixels instead of {'x'.join(map(str, size))}"

    def _guidance_kind(self) -> str:
        if self.true_cfg or {"negative_prompt", "guidance_scale"} <= self.takes:
            embedded = "true_cfg_scale" in self.takes and not self.true_cfg
            return "embedded" if embedded else "classifier-free"
        if "negative_prompt" in self.takes:
            return "fixed"
        return "embedded" if "guidance_scale" in self.takes else "none"


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _undo(sample: Sample) -> None:
    sample.step, sample.error = 0, None
    sample.extra.pop("pixels", None)


def _has_embedded_guidance(pipe: Any) -> bool:
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    return bool(config.get("guidance_embeds", False))


def _grid(pipe: Any) -> int:
    """Sizes must be multiples of this many pixels: the processor's factor, including patches."""
    for name in ("image_processor", "video_processor"):
        config = getattr(getattr(pipe, name, None), "config", {})
        if "vae_scale_factor" in config:
            return int(config["vae_scale_factor"])
    names = ("vae_scale_factor_spatial", "vae_scale_factor")
    return next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), 8)
