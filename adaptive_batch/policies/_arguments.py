"""Arguments of policies, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat


def number(name: str, value: Any) -> Any:
    """``value`` as Python's own kind of number.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, SupportsFloat):
        raise ValueError(f"{name}={value!r} is not a number: pass one.")
    return value if isinstance(value, int | float) else float(value)


def positive(name: str, value: Any) -> float:
    """``value``, if a size can be a multiple of it.

    Raises:
        ValueError: if it is no number, or not positive and finite.
    """
    found: float = number(name, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name}={found} gives no size: pass a positive number.")
    return found


def check_mapping(name: str, value: object) -> None:
    """Refuse what does not give something for each of several positions.

    Raises:
        ValueError: if it is no mapping.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} is no mapping: pass a dict of positions, such as {{0: ..., 5: ...}}.")
