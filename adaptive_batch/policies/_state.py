"""Checking the states of policies that have a memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def checked(policy: object, state: object, **fits: Callable[[Any], bool]) -> Mapping[str, Any]:
    """``state``, if it has exactly these entries and each is what it has to be.

    Raises:
        ValueError: if not; nothing has been changed then.
    """
    if isinstance(state, Mapping) and set(state) == set(fits) and all(fits[name](state[name]) for name in fits):
        return state
    raise ValueError(f"this is not the state of a {type(policy).__name__}: {state!r}; load what state_dict() returned.")


def is_count(value: object) -> bool:
    """A whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    """Any number, NaN and infinities included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_weight(value: object) -> bool:
    """A finite number from 0 on."""
    return is_number(value) and 0 <= value < math.inf  # type: ignore[operator]
