"""The leader's side of a placement in which several ranks share every forward pass.

A family calls `pipe.transformer(...)` once per step without knowing which device computes it:
`GroupTransformer` replaces the transformer and involves all ranks. `GroupPipeline` is the pipeline
around it. Neither knows the mathematics or the collectives.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jobs.errors import (
    ConfigurationError,
    GroupLost,
    ImagemillError,
    ModelUnavailable,
    OutOfMemory,
    first_line,
)
from jobs.request import ImageRequest
from pipelines.families.family import Family
from pipelines.out_of_memory import is_out_of_memory
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.group import Group, is_collective_error
from pipelines.seam import Conditioning, Sample

FORWARD = "forward"
"""Order: take part in a forward pass; the value is (args, kwargs)."""


@contextmanager
def leading(group: Group) -> Iterator[None]:
    """Context in which rank 0 loads the model: any exception ends the group too.

    If this rank's own work lost the group, it would fail the same way at every start, so the cause
    is raised, or a ConfigurationError. A failed collective stays GroupLost, because another rank
    may have caused it.
    """
    try:
        yield
    except (ConfigurationError, ModelUnavailable) as error:
        group.refuse(error)
        raise
    except GroupLost as error:
        verdict = _verdict(error.__cause__)
        if verdict is None:
            raise
        raise verdict from error
    except BaseException as error:
        group.lose(f"rank 0 couldn't load the model: {error}")
        raise


def _verdict(cause: BaseException | None) -> ImagemillError | None:
    """The error to raise for a loss's cause; None if the model isn't to blame."""
    if not isinstance(cause, Exception) or isinstance(cause, GroupLost):
        return None
    if is_collective_error(cause):
        return None
    if isinstance(cause, ConfigurationError | ModelUnavailable):
        return cause
    reason = f"{type(cause).__name__}: {first_line(cause)}"
    if isinstance(cause, OutOfMemory) or is_out_of_memory(cause):
        return OutOfMemory(reason)
    return ConfigurationError(f"rank 0 couldn't run its part of a forward pass: {reason}")


class ModuleProxy(torch.nn.Module):
    """A module that looks like another one (config, dtype, ...) without owning it."""

    def __init__(self, behind: torch.nn.Module) -> None:
        super().__init__()
        # Not as a submodule, because moving the pipeline would move it along.
        self.__dict__["behind"] = behind

    def __getattr__(self, name: str) -> Any:
        """Look up anything else on the module behind."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["behind"], name)


class GroupTransformer(ModuleProxy):
    """The whole group's transformer. `share` runs this rank's part and returns the whole output.

    Raises GroupLost for any failure on any rank.
    """

    def __init__(self, behind: torch.nn.Module, group: Group, share: Callable[..., Any]) -> None:
        super().__init__(behind)
        self.group, self.share = group, share
        self._turn = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass on all ranks, with the transformer's arguments and output."""
        with self._turn, self.group.together():
            self.group.send(FORWARD, (args, kwargs))
            return self.share(*args, **kwargs)


class GroupPipeline(FamilyPipeline):
    """A family whose forward passes a group shares.

    `check` refuses requests that the group would compute wrongly.
    """

    def __init__(
        self, family: Family, group: Group, check: Callable[[ImageRequest], None] | None = None
    ) -> None:
        super().__init__(family, device=group.device)
        self.group = group
        self._check = check

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0. Also raises ImageFailed for a size that the group can't share."""
        if self._check is not None:
            self._check(request)
        return super().start(request, conditioning)

    def check(self) -> None:
        """Raise GroupLost if a rank is gone."""
        self.group.check()

    def dismiss(self) -> None:
        """End the followers. Does nothing if they're gone already."""
        self.group.dismiss()
