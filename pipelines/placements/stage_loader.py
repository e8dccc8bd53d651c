"""Stages that take turns: whose weights are loaded now, who goes, and who is fetched ahead.

A component that is not loaded is its skeleton in the pipe. Loading and unloading put the one in
the place of the other. Follows the plan's arithmetic and measures nothing; knows no verbs.
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from time import monotonic
from typing import Any

import structlog
from torch import nn

from jobs.errors import ModelUnavailable
from pipelines.out_of_memory import is_out_of_memory
from pipelines.placements.residence import Residence, forget_caches, give_back
from pipelines.planner.memory import Plan, in_words
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, STAGES

AHEAD = {ENCODE: DENOISE, DENOISE: DECODE}
"""What is fetched while a stage runs. Never the text encoders: the next prompts may be known."""

Loaded = dict[str, nn.Module]

log = structlog.get_logger(__name__)


class Turns:
    """Which stages of a pipe are loaded. `loads` counts the loads of each."""

    def __init__(self, pipe: Any, plan: Plan, residences: Mapping[str, Residence]) -> None:
        self.plan = plan
        self.loads: Counter[str] = Counter()
        self._pipe, self._residences = pipe, residences
        self._loaded: set[str] = set()
        self._alone: set[str] = set()
        self._coming: tuple[str, Future[Loaded]] | None = None
        self._fetcher = ThreadPoolExecutor(1, "fetch-stage")
        self._lock = RLock()

    @property
    def device_map(self) -> dict[str, str | dict[str, str]]:
        """Where each component is when it is loaded."""
        maps = {name: residence.device_map for name, residence in self._residences.items()}
        return {name: next(iter(m.values())) if len(m) == 1 else m for name, m in maps.items()}

    def is_loaded(self, stage: str) -> bool:
        """Whether the stage's weights are in the pipe."""
        return stage in self._loaded

    def skeleton_of(self, component: Any) -> Any:
        """The skeleton in whose likeness a component of the pipe is loaded."""
        for name, residence in self._residences.items():
            if getattr(self._pipe, name) is component:
                return residence.skeleton
        return None

    def streamed(self, name: str) -> nn.Module:
        """A component for reference; see `Residence.streamed`."""
        return self._residences[name].streamed()

    def load_all(self) -> None:
        """Load every stage; for a plan in which all fit together."""
        for stage in STAGES:
            self.enter(stage)

    def enter(self, stage: str) -> None:
        """Have the stage's weights loaded, and begin to fetch the next one's if both fit.

        A stage that once had to be alone has all others unloaded first. Raises ModelUnavailable,
        and torch's out-of-memory error.
        """
        with self._lock:
            if stage not in self._loaded or not self._has_room(stage):
                self._settle()
                self._make_room(stage)
            if stage not in self._loaded:
                self._put(stage, self._load(stage))
            self._fetch_ahead(stage)

    def unload(self, stage: str) -> None:
        """Let the stage's weights go; their memory is free when this returns."""
        with self._lock:
            self._settle()
            self._drop(stage)

    def clear_for(self, stage: str) -> bool:
        """Let all other weights go, now and whenever this stage runs; whether there were any."""
        with self._lock:
            self._settle()
            others = self._loaded - {stage}
            for other in others:
                self._drop(other)
            self._alone.add(stage)
            return bool(others)

    def _fetch_ahead(self, stage: str) -> None:
        ahead = AHEAD.get(stage)
        if ahead is None or ahead in self._loaded or self._coming or stage in self._alone:
            return
        if self.plan.fit_together({*self._loaded, ahead}, running=stage):
            self._coming = ahead, self._fetcher.submit(self._load, ahead)

    def _settle(self) -> None:
        """Wait for what is being fetched, and put it into the pipe."""
        if self._coming is None:
            return
        (stage, fetched), self._coming = self._coming, None
        try:
            self._put(stage, fetched.result())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no room to fetch ahead", stage=stage, reason=str(error).splitlines()[0])

    def _make_room(self, stage: str) -> None:
        """Drop stages until this one fits, those first whose turn is farthest away."""
        distance = {s: (STAGES.index(s) - STAGES.index(stage)) % len(STAGES) for s in STAGES}
        others = sorted(self._loaded - {stage}, key=lambda s: -distance[s])
        for other in others:
            if self._has_room(stage):
                return
            self._drop(other)

    def _has_room(self, stage: str) -> bool:
        """Whether the stage may run beside what is loaded; if alone once, then always alone."""
        if stage in self._alone:
            return self._loaded <= {stage}
        return self.plan.fit_together({*self._loaded, stage}, running=stage)

    def _load(self, stage: str) -> Loaded:
        began = monotonic()
        made: Loaded = {}
        for spread in self.plan.stages[stage]:
            name = spread.part.name
            try:
                made[name] = self._residences[name].load()
            except (OSError, ValueError, KeyError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelUnavailable(f"{name} cannot be loaded: {reason}") from error
        self.loads[stage] += 1
        log.info(
            "stage loaded",
            stage=stage,
            size=in_words(sum(s.part.size for s in self.plan.stages[stage])),
            seconds=round(monotonic() - began, 3),
        )
        return made

    def _put(self, stage: str, made: Loaded) -> None:
        for name, module in made.items():
            setattr(self._pipe, name, module)
        self._loaded.add(stage)

    def _drop(self, stage: str) -> None:
        if stage not in self._loaded:
            return
        self._loaded.discard(stage)
        for spread in self.plan.stages[stage]:
            name = spread.part.name
            forget_caches(getattr(self._pipe, name))
            setattr(self._pipe, name, self._residences[name].skeleton)
        give_back()
        log.info("stage unloaded", stage=stage)
