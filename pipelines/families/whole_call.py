"""Any other text-to-image pipeline of diffusers, one whole call at a time.

A step is the whole pipeline call over images of equal size, steps and guidance, so nothing joins
it midway. Their prompts have equally many tokens, since many pipelines pad them to the longest;
where that cannot be told, and where the pipeline takes no batches, every image has its own call.
Progress and cancellation go through the pipeline's step callback. Passes only what the pipeline's
`__call__` takes, and leaves everything else at its defaults, except that sizes are exact: no
resolution binning. Knows nothing of what happens inside the call.
"""

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import structlog
import torch

from jobs.errors import ImageFailed, ModelUnavailable
from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import REFUSED, Role
from pipelines.families.whole_text import PromptTexts
from pipelines.out_of_memory import is_out_of_memory
from pipelines.seam import Card, Conditioning, Sample

log = structlog.get_logger(__name__)


class _AllCancelledError(Exception):
    """Nobody wants the running call's images any more."""


class WholeCall:
    """A DiffusionPipeline behind the seam; `extra["pixels"]` of a done sample is its image.

    `batches` says whether a call takes several images: None until the first try has told.
    """

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = max_sequence_length
        self.takes = frozenset(inspect.signature(pipe.__call__).parameters)
        _check_makes_images_from_text(pipe)
        # As for Flux: where the transformer has no embedded guidance, guidance is the true one.
        self.true_cfg = "true_cfg_scale" in self.takes and not _has_embedded_guidance(pipe)
        self.prompts = PromptTexts(pipe, max_sequence_length)
        self.batches: bool | None = None if self.prompts.comparable else False
        self.card = Card(
            family="whole_call",
            multiple=_grid(pipe),
            guidance=self._guidance_kind(),
            joins=False,
            max_prompt_tokens=self.prompts.limit,
            scheduler=type(getattr(pipe, "scheduler", None)).__name__,
            prompt=self.prompts.form,
            guides_above=0.0,  # from outside only a scale of 0 is certain to turn it off
        )

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
        """A sample without latents; its steps are the request's."""
        return Sample(request, conditioning, None, None, request.steps)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """The whole call. Returns early, samples undone, when all of them are cancelled.

        A call an image where a call takes no more: `bucket` counts for nothing then, so that an
        image is always made alone.
        """
        rows = batch.padded(samples, bucket)
        if len(rows) == 1:
            self._call(samples, rows)
        elif self.batches is False:
            self._call_each(samples)
        elif self.batches:
            self._call(samples, rows)
        else:
            self._find_out(samples, rows)

    def _find_out(self, samples: Sequence[Sample], rows: Sequence[Sample]) -> None:
        """Call the pipeline for several images for the first time, or for each when it refuses.

        It refuses when the batch fails and every one of its images succeeds alone.
        """
        try:
            self._call(samples, rows)
        except torch.AcceleratorError:
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
            log.warning("no batches", pipeline=type(self.pipe).__name__, reason=str(refusal))

    def _call_each(self, samples: Sequence[Sample]) -> None:
        """A call for each; when one fails, those before it are done."""
        for sample in samples:
            if not sample.done:
                self._call([sample], [sample])

    def _call(self, samples: Sequence[Sample], rows: Sequence[Sample]) -> None:
        """One call for the rows, of which the samples are the first."""
        requests = [row.request for row in rows]
        try:
            output = self.pipe(**self._arguments(requests), **self._callback(samples))
            verdicts = getattr(output, "nsfw_content_detected", None) or [False] * len(samples)
            images = _images(output, type(self.pipe).__name__, len(rows))
            for sample, image, refused in zip(samples, images, verdicts, strict=False):
                _finish(sample, image, bool(refused))
        except BaseException as error:
            self.pipe.maybe_free_model_hooks()  # as the call would at its end: empties caches
            if isinstance(error, _AllCancelledError):
                return
            for sample in samples:
                _undo(sample)
            raise

    def decode(self, sample: Sample) -> torch.Tensor:
        """The pixels that the call has made."""
        if "pixels" not in sample.extra:
            raise ImageFailed("the image has not been made")
        pixels: torch.Tensor = sample.extra["pixels"]
        return pixels

    def _arguments(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        first = requests[0]
        wanted = {
            "prompt": [r.prompt for r in requests],
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.steps,
            "generator": [batch.seeded(r) for r in requests],
            "output_type": "pt",
            "use_resolution_binning": False,
        }
        wanted["true_cfg_scale" if self.true_cfg else "guidance_scale"] = first.guidance_scale
        if self.length is not None:
            wanted["max_sequence_length"] = self.length
        if self.true_cfg or first.negative_prompt is not None:
            wanted["negative_prompt"] = [r.negative_prompt or "" for r in requests]
        return {name: value for name, value in wanted.items() if name in self.takes}

    def _callback(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Arguments by which the call tells of every step, in today's way or the older one."""

        def on_step_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            self._tell(samples, index)
            return {}

        def on_step(index: int, timestep: Any, latents: Any) -> None:
            self._tell(samples, index)

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

    def _guidance_kind(self) -> str:
        if self.true_cfg or {"negative_prompt", "guidance_scale"} <= self.takes:
            embedded = "true_cfg_scale" in self.takes and not self.true_cfg
            return "embedded" if embedded else "classifier-free"
        if "negative_prompt" in self.takes:
            return "fixed"
        return "embedded" if "guidance_scale" in self.takes else "none"


def _images(output: Any, name: str, count: int) -> Any:
    if not hasattr(output, "images"):
        raise ImageFailed(f"{name} makes no images but {type(output).__name__}")
    if len(output.images) != count:
        raise ImageFailed(f"{name} made {len(output.images)} images of {count} prompts")
    return output.images


def _undo(sample: Sample) -> None:
    sample.step, sample.error = 0, None
    sample.extra.pop("pixels", None)


def _finish(sample: Sample, image: torch.Tensor, refused: bool) -> None:
    sample.step = sample.steps
    height, width = image.shape[-2:]
    if refused:
        sample.error = REFUSED
    elif (width, height) != (sample.request.width, sample.request.height):
        sample.error = f"the pipeline made {width}x{height} pixels, which nobody asked for"
    elif not torch.isfinite(image).all():
        sample.error = "the pipeline made NaN or infinite pixels"
    else:
        sample.extra["pixels"] = image.cpu()


def _check_makes_images_from_text(pipe: Any) -> None:
    """Refuse pipelines that take no prompt or no size, or need more, such as an image."""
    parameters = inspect.signature(pipe.__call__).parameters
    lacking = [name for name in ("prompt", "width", "height") if name not in parameters]
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name != "prompt"
    ]
    if lacking or needed:
        raise ModelUnavailable(
            f"{type(pipe).__name__} does not make images from a prompt and a size alone"
            + (f"; it takes no {', '.join(lacking)}" if lacking else "")
            + (f"; it needs {', '.join(needed)}" if needed else "")
        )


def _has_embedded_guidance(pipe: Any) -> bool:
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    return bool(config.get("guidance_embeds", False))


def _grid(pipe: Any) -> int:
    """Pixels that sizes must be multiples of: the image processor's, which counts patches too."""
    processor = getattr(pipe, "image_processor", None)
    config = getattr(processor, "config", {})
    return int(config.get("vae_scale_factor", getattr(pipe, "vae_scale_factor", 8)))
