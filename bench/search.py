"""Search for the highest load that can be served on time."""

from collections.abc import Callable


def highest(
    carried: Callable[[float], bool], guess: float, least: float, *, precision: float, stride: float
) -> float:
    """The highest load that `carried` accepts, to the factor `precision`: bracketed, then bisected.

    Raises RuntimeError if even the load `least` can't be served on time.
    """
    low = high = guess
    if carried(guess):
        while carried(high := high * stride):
            low = high
    else:
        while not carried(low := low / stride):
            high = low
            if low < least:
                raise RuntimeError(f"even a load of {least:.2g} can't be served on time")
    while high / low > precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if carried(middle) else (low, middle)
    return low
