"""Warm-up's last part: run every size and bucket once, and find which buckets give the same bits.

The first run of each size and bucket is slow. The runs also show whether a sample gets the same
bits in a larger batch as alone. Nothing guarantees it: kernels split their sums by the shape of
their input, and most GPU kernels depend on the number of rows. Where it holds, reproducible samples
can share any batch.
"""

from collections.abc import Sequence
from dataclasses import replace

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import GroupLost
from jobs.request import ImageRequest
from pipelines.seam import Pipeline
from workers.pass_timer import PassTimer, probe, tokens_of
from workers.scheduler import BUCKETS, WORTH_WAITING, Costs

log = structlog.get_logger(__name__)

COMPARISON_SECONDS = 2.0
"""Most seconds per size to spend on comparing buckets that requests don't use yet."""


def rehearse(model: Model, costs: Costs, timer: PassTimer) -> dict[str, int]:
    """Run the default and every listed size once in each bucket that requests will use.

    Returns `Costs.same_bits`. Finds nothing with a feature cache, because passes then differ in
    what they skip, or if samples can't join one another.
    """
    pipeline, usual = timer.pipeline, probe(model)
    sizes = {(usual.width, usual.height), *model.limits.sizes}
    same_bits = {}
    for request in [replace(usual, width=width, height=height) for width, height in sorted(sizes)]:
        tokens = tokens_of(pipeline, request)
        knees = {costs.largest(tokens), costs.largest(tokens, WORTH_WAITING)}
        ran = [
            bucket
            for bucket in sorted({1, costs.pinned(tokens), *knees})
            if timer.seconds(request, bucket, rounds=1) is not None
        ]
        if pipeline.card.joins and model.cache is None and ran:
            to_compare = _worth_comparing(costs, tokens, ran[-1])
            largest = largest_with_same_bits(pipeline, request, to_compare)
            if largest >= costs.pinned(tokens):
                same_bits[repr(pipeline.batch_key(request))] = largest
    log.info("warm-up: largest batch with the bits of a lone sample", by_size=same_bits)
    return same_bits


def _worth_comparing(costs: Costs, tokens: int, least: int) -> int:
    """The largest bucket to compare: `least`, or a larger one that warm-up has measured.

    Larger ones matter because costs learned from real work may favour them later.
    """

    def seconds(largest: int) -> float:
        together = (costs.of(tokens, bucket) for bucket in BUCKETS if 1 < bucket <= largest)
        return largest * costs.of(tokens, 1) + sum(together)

    measured = costs.points[-1][0] // tokens if costs.points else 1
    affordable = [b for b in BUCKETS if b <= measured and seconds(b) <= COMPARISON_SECONDS]
    return max([least, *affordable])


def largest_with_same_bits(pipeline: Pipeline, request: ImageRequest, largest: int) -> int:
    """The bucket, at most `largest`, up to which all samples get the same bits as alone.

    Compares one step of every sample of every bucket, bit by bit. One step is enough because a
    kernel's order of operations depends on the shape of its input and not on the values.
    """
    [conditioning] = pipeline.encode([request])

    def stepped(seeds: Sequence[int], bucket: int) -> list[torch.Tensor | None]:
        samples = [pipeline.start(replace(request, seed=s), conditioning) for s in seeds]
        pipeline.step(samples, bucket)
        return [None if sample.error else sample.latents for sample in samples]

    alone: list[torch.Tensor | None] = []
    same = 1
    try:
        for bucket in [b for b in BUCKETS if 1 < b <= largest]:
            alone += [stepped([seed], 1)[0] for seed in range(len(alone), bucket)]
            together = stepped(range(bucket), bucket)
            if not all(map(_is_same, alone, together)):
                break
            same = bucket
    except (torch.AcceleratorError, GroupLost):
        raise
    except Exception as error:  # requests of this size will report it
        log.info("warm-up: comparing batches failed", reason=str(error))
    return same


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
