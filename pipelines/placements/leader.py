"""The leader's side of a placement in which several ranks share every forward pass.

A family calls `pipe.transformer(...)` once a step and need not know who computes: `Lead` stands
in the transformer's place and has all ranks take part. `Led` is the family around it. Knows no
mathematics and no collectives.
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
)
from jobs.request import ImageRequest
from pipelines.families.family import Family
from pipelines.out_of_memory import is_out_of_memory
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.group import Group, is_collective
from pipelines.seam import Conditioning, Sample

FORWARD = "forward"
"""The order to take part in a forward pass; its value is (args, kwargs)."""


@contextmanager
def leading(group: Group) -> Iterator[None]:
    """Rank 0 loads the model inside: whatever it raises ends the group too.

    A loss that began with what this rank itself was doing comes back at every start: it is raised
    as what caused it, or as ConfigurationError. A collective that failed may have been another's.
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
        group.lose(f"rank 0 could not load the model: {error}")
        raise


def _verdict(cause: BaseException | None) -> ImagemillError | None:
    """What a cause of a loss says about the model; None if nothing."""
    if not isinstance(cause, Exception) or is_collective(cause) or isinstance(cause, GroupLost):
        return None
    if isinstance(cause, ConfigurationError | ModelUnavailable):
        return cause
    reason = f"{type(cause).__name__}: {(str(cause) or 'no reason given').splitlines()[0]}"
    if isinstance(cause, OutOfMemory) or is_out_of_memory(cause):
        return OutOfMemory(reason)
    return ConfigurationError(f"rank 0 cannot take part in a forward pass: {reason}")


class Facade(torch.nn.Module):
    """A module that looks like another one (config, dtype, ...), which it does not own."""

    def __init__(self, behind: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["behind"] = behind  # not as a submodule: it may be elsewhere, or in parts

    def __getattr__(self, name: str) -> Any:
        """Whatever is not here is the module's behind."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["behind"], name)


class Lead(Facade):
    """The transformer of the whole group. `share` is this rank's part, and gives the whole output.

    Raises GroupLost, whatever it was that went wrong on any rank.
    """

    def __init__(self, behind: torch.nn.Module, group: Group, share: Callable[..., Any]) -> None:
        super().__init__(behind)
        self.group, self.share = group, share
        self._turn = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass by all ranks; the arguments and the output are the transformer's."""
        with self._turn, self.group.together():
            self.group.send(FORWARD, (args, kwargs))
            return self.share(*args, **kwargs)


class Led(FamilyPipeline):
    """A family whose forward passes a group shares. `check` refuses what the group gets wrong."""

    def __init__(
        self, family: Family, group: Group, check: Callable[[ImageRequest], None] | None = None
    ) -> None:
        super().__init__(family, device=group.device)
        self.group = group
        self._check = check

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0. Raises ImageFailed also for a size that the group cannot share."""
        if self._check is not None:
            self._check(request)
        return super().start(request, conditioning)

    def check(self) -> None:
        """Raise GroupLost when a rank is gone."""
        self.group.check()

    def dismiss(self) -> None:
        """End the followers. Harmless when they are gone."""
        self.group.dismiss()
