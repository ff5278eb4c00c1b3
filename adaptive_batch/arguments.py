"""Arguments that callbacks and trainers have in common, checked in one place."""

from __future__ import annotations

from numbers import Integral

__all__ = ["check_choice", "check_micro_batch_size"]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def check_flags(**flags: object) -> None:
    """Refuse what is neither true nor false: ``"no"`` would be taken for true."""
    for name, value in flags.items():
        if value not in (True, False):
            raise ValueError(f"{name}={value!r} must be True or False.")


def check_seed(value: object) -> None:
    """Refuse what cannot be a seed."""
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise ValueError(f"seed={value!r} must be a whole number, or None.")


def check_micro_batch_size(value: int | str | None) -> int | None:
    """The bound on the samples per pass that it is; refuse what is no number of samples, ``"auto"`` or ``None``."""
    if value is None or value == "auto":
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f'micro_batch_size={value!r} must be a positive number of samples, "auto" or None.')
    return int(value)
