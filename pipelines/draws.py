"""Random numbers that a pipeline draws without a generator, made to depend on the seed alone.

Some pipelines and schedulers ignore the generator that they are given, or a part of them does (a
prompt enhancer, a stochastic sampler), and draw from torch's global one. `Draws` gives such
operations a private generator. It acts on the thread that enters it and leaves the global
generators alone, so other threads neither change its numbers nor notice it. It sees every operation
that torch runs, which costs some microseconds each, so only calls that draw run inside it:
`global_states` before and after a call tell whether one did.

numpy's and Python's own global generators aren't covered: no pipeline of diffusers draws from them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_OFFSET = 0x5851F42D4C957F2D
"""Added to the seed, so that these numbers aren't the ones that the first latents came from."""


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every random operation of this thread that names no generator has a seeded one.

    `count` is how many such operations there were.
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
        """Run one operation, with a generator if it is random and has none."""
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

    None where there is none: dropout and attention, which draw nothing outside of training.
    """
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        taken = [argument.name for argument in overload._schema.arguments]
        if "generator" in taken and [name for name in taken if name != "generator"] == names:
            return overload
    return None


def global_states() -> list[bytes]:
    """The states of torch's global generators; equal ones mean that nothing was drawn between."""
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        generators = getattr(torch.get_device_module(), "default_generators", ())
        states += [generator.get_state() for generator in generators]
    return [state.numpy().tobytes() for state in states]
