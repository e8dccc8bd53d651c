"""Make random numbers that a pipeline draws without a generator depend on the seed alone.

Some pipelines and schedulers, or parts of them (a prompt enhancer, a stochastic sampler), ignore
the generator they're given and draw from torch's global one. `Draws` gives such operations a
private generator. It only affects the thread that enters it and doesn't touch the global
generators, so threads don't influence each other. It intercepts every torch operation, which costs
a few microseconds each, so it's only used for calls that draw: compare `global_states` before and
after a call.

numpy's and Python's global generators aren't covered, because no diffusers pipeline draws from
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_OFFSET = 0x5851F42D4C957F2D
"""Added to the seed, so that these numbers differ from those of the first latents."""


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager: gives this thread's random operations a seeded generator if they have none.

    `count` is the number of such operations so far.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = (seed + _OFFSET) % 2**63
        self.count = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation, adding a generator if it's random and was called without one."""
        named = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and named.get("generator") is None:
            overload = _with_generator(func)
            if overload is not None:
                self.count += 1
                named["generator"] = self._generator(args, named)
                return overload(*args, **named)
        return func(*args, **named)

    def _generator(self, args: Sequence[Any], named: Mapping[str, Any]) -> torch.Generator:
        tensors = (value for value in args if isinstance(value, torch.Tensor))
        like = next(tensors, None)
        device = torch.device(named.get("device") or ("cpu" if like is None else like.device))
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _with_generator(func: Any) -> Any:
    """The overload of a random operation that takes a generator.

    Dropout and attention have no such overload (None), but only draw during training.
    """
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        arguments = [argument.name for argument in overload._schema.arguments]
        if "generator" in arguments and [a for a in arguments if a != "generator"] == names:
            return overload
    return None


def global_states() -> list[bytes]:
    """The states of torch's global generators; if two are equal, nothing was drawn in between."""
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        generators = getattr(torch.get_device_module(), "default_generators", ())
        states += [generator.get_state() for generator in generators]
    return [state.numpy().tobytes() for state in states]
