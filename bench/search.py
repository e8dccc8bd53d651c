"""Search for the highest load that is still carried."""

from collections.abc import Callable


def highest(
    carried: Callable[[float], bool], guess: float, least: float, *, precision: float, stride: float
) -> float:
    """The highest load carried, within the factor `precision`: bracketed in strides, then bisected.

    Raises RuntimeError when not even the load `least` is carried.
    """
    low = high = guess
    if carried(guess):
        while carried(high := high * stride):
            low = high
    else:
        while not carried(low := low / stride):
            high = low
            if low < least:
                raise RuntimeError(f"not even a load of {least:.2g} is carried in good time")
    while high / low > precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if carried(middle) else (low, middle)
    return low
