"""Where a run is, in the unit that a schedule counts in."""

from __future__ import annotations

import math
from collections.abc import Callable

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies._arguments import number

_POSITION: dict[str, Callable[[Measurement], int]] = {
    "epochs": lambda measurement: measurement.epoch,
    "updates": lambda measurement: measurement.update,
    "samples": lambda measurement: measurement.samples,
}


def check_unit(unit: str, owner: str) -> str:
    """``unit``, if there is such a one.

    Raises:
        ValueError: for any other, listing the known ones.
    """
    if unit not in _POSITION:
        raise ValueError(f"unit={unit!r} is not a unit of {owner}: use one of {', '.join(_POSITION)}.")
    return unit


def position(measurement: Measurement, unit: str) -> int:
    """Whole epochs from 0, updates or samples done so far."""
    return _POSITION[unit](measurement)


def check_start(start: float, unit: str, owner: str) -> None:
    """Refuse a position that no run can be at.

    Raises:
        ValueError: if it is negative, not finite, or a fraction of an epoch.
    """
    if not 0 <= number(f"a position of {owner}", start) < math.inf:
        raise ValueError(f"{owner} has the position {start}: pass a finite number from 0 on.")
    if unit == "epochs" and start != int(start):
        raise ValueError(f'{owner} has the epoch {start}: use whole epochs, or unit="samples" for less.')


def check_length(name: str, length: float, unit: str) -> float:
    """``length``, if it is a positive finite stretch of a run.

    Raises:
        ValueError: if it is not, or less than an epoch counted in epochs.
    """
    length = number(name, length)
    if not 0 < length < math.inf:
        raise ValueError(f"{name}={length} is no stretch of a run: pass a positive finite number.")
    if unit == "epochs" and length < 1:
        raise ValueError(f'{name}={length} is less than an epoch: use whole epochs, or unit="samples".')
    return length
