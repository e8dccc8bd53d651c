"""Any other text-to-image pipeline of diffusers, one whole call at a time.

A step is the whole pipeline call over images of equal size, steps and guidance, so nothing joins
it midway. Their prompts have equally many tokens, since many pipelines pad them to the longest;
where that cannot be told, and where the pipeline takes no batches, every image has its own call.
Progress and cancellation go through the pipeline's step callback. Passes only what the pipeline's
`__call__` takes, and leaves everything else at its defaults, except that sizes are exact: no
resolution binning; and that a class that makes videos makes one frame. Knows nothing of what
happens inside the call.

The picture is the one that the class itself returns as PIL images: its own conversion to 0..1, its
own watermark, its own safety checker.
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
    """Nobody wants the running call's images any more."""


class _DrawsGloballyError(Exception):
    """The pipeline draws from torch's global generator, so that a batch is not reproducible."""


class WholeCall:
    """A DiffusionPipeline behind the seam; `extra["pixels"]` of a done sample is its image.

    `batches` says whether a call takes several images: None until the first try has told. `draws`
    says whether a call has drawn from torch's global generator; from then on each image has a call
    of its own, with random numbers of its own.
    """

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.name = type(pipe).__name__
        self.length = max_sequence_length
        if sentence := refusal(type(pipe)):
            raise ModelUnavailable(sentence)
        self.takes = frozenset(inspect.signature(pipe.__call__).parameters)
        self.frames = frames_argument(type(pipe))
        # As for Flux: where the transformer has no embedded guidance, guidance is the true one.
        self.true_cfg = "true_cfg_scale" in self.takes and not _has_embedded_guidance(pipe)
        self.prompts = PromptTexts(pipe, max_sequence_length)
        self.batches: bool | None = None if self.prompts.comparable else False
        self.draws = False
        self._made: dict[tuple[int, int], tuple[int, int]] = {}
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
        """What the model is; `sizes` once a call has made another size than it was asked for."""
        if all(asked == made for asked, made in self._made.items()):
            return self._card
        kept = sorted(asked for asked, made in self._made.items() if asked == made)
        return replace(self._card, sizes=tuple(kept))

    def tokenizer_json(self) -> str | None:
        """The pipeline's only tokenizer; None where it has several or prepares its text."""
        return self.prompts.tokenizer_json()

    def batch_key(self, request: ImageRequest) -> Hashable:
        """All that one pipeline call has only one of; the request itself where it goes alone."""
        if self.batches is False:
            return request
        has_negative = request.negative_prompt is not None
        one = (request.width, request.height, request.steps, request.guidance_scale, has_negative)
        return one, self.prompts.key(request)

    def rows(self, request: ImageRequest) -> int:
        """Two under classifier-free guidance, as far as one can tell from outside."""
        guided = self.card.guidance == "classifier-free" and request.guidance_scale > 1
        return 2 if guided else 1

    def tokens(self, request: ImageRequest) -> int:
        """Cells of the model's size grid."""
        return (request.width // self.card.multiple) * (request.height // self.card.multiple)

    def texts(self, request: ImageRequest) -> Mapping[Role, str | None]:
        """The prompts, only to tell whether they are too long."""
        texts: dict[Role, str | None] = {"positive": request.prompt}
        if request.negative_prompt is not None:
            texts["negative"] = request.negative_prompt
        return texts

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """No tensors, since the call encodes for itself; only whether the text is cut."""
        return Conditioning({}, truncated=self.prompts.truncated(text or ""))

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample without latents; its steps are the request's.

        Raises ImageFailed for a size that is known to come out as another one.
        """
        size = request.width, request.height
        if self._made.get(size, size) != size:
            raise ImageFailed(self._rewritten(size))
        return Sample(request, conditioning, None, None, request.steps)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """The whole call. Returns early, samples undone, when all of them are cancelled.

        A call an image where a call takes no more: `bucket` counts for nothing then, so that an
        image is always made alone.
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
                self._find_out(samples, rows)
        except _DrawsGloballyError:
            self.batches = False
            self._call_each(samples)

    def _find_out(self, samples: Sequence[Sample], rows: Sequence[Sample]) -> None:
        """Call the pipeline for several images for the first time, or for each when it refuses.

        It refuses when the batch fails and every one of its images succeeds alone.
        """
        try:
            self._call(samples, rows)
        except (torch.AcceleratorError, _DrawsGloballyError):
            raise
        except Exception as error:  # whatever a pipeline makes of a batch
            if is_out_of_memory(error):
                raise
            refusal = error
        else:
            self.batches = all(s.done for s in samples) or None
            return
        try:
            self._call_each(samples)
        except Exception:
            for sample in samples:
                _undo(sample)
            raise refusal from None
        if all(sample.done for sample in samples):  # none was cancelled
            self.batches = False
            log.warning("no batches", pipeline=self.name, reason=str(refusal))

    def _call_each(self, samples: Sequence[Sample]) -> None:
        """A call for each; when one fails, those before it are done."""
        for sample in samples:
            if not sample.done:
                self._call([sample], [sample])

    def _call(self, samples: Sequence[Sample], rows: Sequence[Sample]) -> None:
        """One call for the rows, of which the samples are the first."""
        requests = [row.request for row in rows]
        try:
            output = self._run(samples, requests)
            verdicts = refused(output, len(rows))
            images = pictures(output, self.name, len(rows))
            for sample, image, verdict in zip(samples, images, verdicts, strict=False):
                self._finish(sample, image, verdict)
        except BaseException as error:
            self.pipe.maybe_free_model_hooks()  # as the call would at its end: empties caches
            if isinstance(error, _AllCancelledError):
                return
            for sample in samples:
                _undo(sample)
            raise

    def _run(self, samples: Sequence[Sample], requests: Sequence[ImageRequest]) -> Any:
        """The pipeline's output, whose bits depend on the requests alone.

        Raises _DrawsGloballyError when a call of several draws from torch's global generator.
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
            # The first call has moved the generator that it was given.
            output = self._converted(arguments | self._generator(requests))
        if draws.count and not self.draws:
            self.draws, self.batches = True, False
            log.info("draws from the global generator: one image a call", pipeline=self.name)
        return output

    def _converted(self, arguments: dict[str, Any]) -> Any:
        """Call the pipeline. Where it makes 8-bit pictures itself, NaN must not become black."""
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
        """The pixels that the call has made."""
        if "pixels" not in sample.extra:
            raise ImageFailed("the image has not been made")
        pixels: torch.Tensor = sample.extra["pixels"]
        return pixels

    def _arguments(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        first = requests[0]
        asked: dict[str, Any] = {
            "prompt": _one_or_list([r.prompt for r in requests]),
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.steps,
            # Every class converts "np" as it does for its pictures, not so "pt"; only those with a
            # watermarker add to the pictures what arrays don't get.
            "output_type": "np" if getattr(self.pipe, "watermarker", None) is None else "pil",
            # Two ways to ask for the very size.
            "use_resolution_binning": False,
            "max_area": first.width * first.height,
            **self._generator(requests),
        }
        asked["guidance_schedule"] = None  # its default excludes a scale
        asked["true_cfg_scale" if self.true_cfg else "guidance_scale"] = first.guidance_scale
        if self.frames:
            asked[self.frames] = 1
        if self.length is not None:
            asked["max_sequence_length"] = self.length
        needs_negative = self.true_cfg or self.name in NEGATIVE_NEEDED
        if needs_negative or first.negative_prompt is not None:
            asked["negative_prompt"] = _one_or_list([r.negative_prompt or "" for r in requests])
        return {name: value for name, value in asked.items() if name in self.takes}

    def _generator(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """One generator for one image, since some pipelines take no list."""
        if "generator" not in self.takes:
            return {}
        return {"generator": _one_or_list([batch.seeded(r) for r in requests])}

    def _callback(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Arguments by which the call tells of every step, in today's way or the older one."""

        def on_step_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            self._tell(samples, index)
            return {}

        def on_step(index: int, timestep: Any, latents: Any) -> None:
            self._tell(samples, index)

        if self.name in MISCALLING:
            return {}
        if "callback_on_step_end" in self.takes:
            return {"callback_on_step_end": on_step_end}
        if {"callback", "callback_steps"} <= self.takes:
            return {"callback": on_step, "callback_steps": 1}
        return {}

    def _tell(self, samples: Sequence[Sample], index: int) -> None:
        if all(s.cancelled for s in samples):
            raise _AllCancelledError
        for sample in samples:
            # A second-order scheduler has more timesteps than the request has steps.
            total = max(getattr(self.pipe, "num_timesteps", 0), sample.steps)
            sample.step = min((index + 1) * sample.steps // total, sample.steps)

    def _finish(self, sample: Sample, image: torch.Tensor, verdict: bool) -> None:
        sample.step = sample.steps
        asked = (sample.request.width, sample.request.height)
        self._made[asked] = (image.shape[-1], image.shape[-2])
        if verdict:
            sample.error = REFUSED
        elif self._made[asked] != asked:
            sample.error = self._rewritten(asked)
        else:
            try:
                check_pixels(image)
            except ImageFailed as error:
                sample.error = str(error)
            else:
                sample.extra["pixels"] = image

    def _rewritten(self, asked: tuple[int, int]) -> str:
        made = "x".join(map(str, self._made[asked]))
        return f"{self.name} makes {made} pixels where {'x'.join(map(str, asked))} are asked for"

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
    """Pixels that sizes must be multiples of: the processor's, which counts patches too."""
    for name in ("image_processor", "video_processor"):
        config = getattr(getattr(pipe, name, None), "config", {})
        if "vae_scale_factor" in config:
            return int(config["vae_scale_factor"])
    names = ("vae_scale_factor_spatial", "vae_scale_factor")
    return next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), 8)
