"""Which stages' weights are loaded, which are dropped for another, and which are prefetched.

While a component isn't loaded, the pipe holds its skeleton; loading and unloading swap the two.
Relies on the plan's arithmetic and measures nothing. Doesn't know what the stages compute.
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from time import monotonic
from typing import Any

import structlog
from torch import nn

from jobs.errors import ModelUnavailable, first_line
from pipelines.out_of_memory import is_out_of_memory
from pipelines.placements.residence import Residence, clear_function_caches, release_memory
from pipelines.planner.memory import MemoryPlan, in_words
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, STAGES

AHEAD = {ENCODE: DENOISE, DENOISE: DECODE}
"""Stage -> the one to prefetch while it runs. Never the text encoders, because the next prompts'
embeddings may be cached."""

Loaded = dict[str, nn.Module]

log = structlog.get_logger(__name__)


class StageLoader:
    """Loads and unloads the stages of a pipe. `loads` counts each stage's loads."""

    def __init__(self, pipe: Any, plan: MemoryPlan, residences: Mapping[str, Residence]) -> None:
        self.plan = plan
        self.loads: Counter[str] = Counter()
        self._pipe, self._residences = pipe, residences
        self._loaded: set[str] = set()
        self._alone: set[str] = set()
        self._prefetch: tuple[str, Future[Loaded]] | None = None
        self._fetcher = ThreadPoolExecutor(1, "fetch-stage")
        self._lock = RLock()

    @property
    def device_map(self) -> dict[str, str | dict[str, str]]:
        """Where each component is while it's loaded."""
        maps = {name: residence.device_map for name, residence in self._residences.items()}
        return {name: next(iter(m.values())) if len(m) == 1 else m for name, m in maps.items()}

    def is_loaded(self, stage: str) -> bool:
        """Whether the stage's weights are in the pipe."""
        return stage in self._loaded

    def skeleton_of(self, component: Any) -> Any:
        """The skeleton of a component of the pipe, loaded or not; None for others."""
        for name, residence in self._residences.items():
            if getattr(self._pipe, name) is component:
                return residence.skeleton
        return None

    def streamed(self, name: str) -> nn.Module:
        """A component to compare with; see `Residence.streamed`."""
        return self._residences[name].streamed()

    def load_all(self) -> None:
        """Load every stage. Use it with a plan in which all fit together."""
        for stage in STAGES:
            self.enter(stage)

    def enter(self, stage: str) -> None:
        """Load the stage's weights if needed, and start to prefetch the next stage's if both fit.

        Unloads all others first if the stage has run out of memory next to them before. Raises
        ModelUnavailable, and torch's out-of-memory error.
        """
        with self._lock:
            if stage not in self._loaded or not self._has_room(stage):
                self._settle()
                self._make_room(stage)
            if stage not in self._loaded:
                self._put(stage, self._load(stage))
            self._fetch_ahead(stage)

    def unload(self, stage: str) -> None:
        """Unload the stage; its memory is free when this returns."""
        with self._lock:
            self._settle()
            self._drop(stage)

    def clear_for(self, stage: str) -> bool:
        """Unload all other stages, now and before each later run; returns if there were any."""
        with self._lock:
            self._settle()
            others = self._loaded - {stage}
            for other in others:
                self._drop(other)
            self._alone.add(stage)
            return bool(others)

    def _fetch_ahead(self, stage: str) -> None:
        ahead = AHEAD.get(stage)
        if ahead is None or ahead in self._loaded or self._prefetch or stage in self._alone:
            return
        if self.plan.fit_together({*self._loaded, ahead}, running=stage):
            self._prefetch = ahead, self._fetcher.submit(self._load, ahead)

    def _settle(self) -> None:
        """Wait for the prefetch, if there's one, and put its modules into the pipe."""
        if self._prefetch is None:
            return
        (stage, fetched), self._prefetch = self._prefetch, None
        try:
            self._put(stage, fetched.result())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no room to fetch ahead", stage=stage, reason=first_line(error))

    def _make_room(self, stage: str) -> None:
        """Drop stages until this one fits, starting with the one needed again last."""
        distance = {s: (STAGES.index(s) - STAGES.index(stage)) % len(STAGES) for s in STAGES}
        others = sorted(self._loaded - {stage}, key=lambda s: -distance[s])
        for other in others:
            if self._has_room(stage):
                return
            self._drop(other)

    def _has_room(self, stage: str) -> bool:
        """Whether the stage fits next to what's loaded. One that needed all room never does."""
        if stage in self._alone:
            return self._loaded <= {stage}
        return self.plan.fit_together({*self._loaded, stage}, running=stage)

    def _load(self, stage: str) -> Loaded:
        began = monotonic()
        modules: Loaded = {}
        for spread in self.plan.stages[stage]:
            name = spread.part.name
            try:
                modules[name] = self._residences[name].load()
            except (OSError, ValueError, KeyError) as error:
                raise ModelUnavailable(f"couldn't load {name}: {first_line(error)}") from error
        self.loads[stage] += 1
        log.info(
            "stage loaded",
            stage=stage,
            size=in_words(sum(s.part.size for s in self.plan.stages[stage])),
            seconds=round(monotonic() - began, 3),
        )
        return modules

    def _put(self, stage: str, modules: Loaded) -> None:
        for name, module in modules.items():
            setattr(self._pipe, name, module)
        self._loaded.add(stage)

    def _drop(self, stage: str) -> None:
        if stage not in self._loaded:
            return
        self._loaded.discard(stage)
        for spread in self.plan.stages[stage]:
            name = spread.part.name
            clear_function_caches(getattr(self._pipe, name))
            setattr(self._pipe, name, self._residences[name].skeleton)
        release_memory()
        log.info("stage unloaded", stage=stage)
