"""Numbers in the sentences that give the reason of a decision."""

from __future__ import annotations

import math

from adaptive_batch.measurement import Measurement


def count(value: float) -> str:
    """``1234.5`` as "1234", ``26.75`` as "26.8"."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(ratio: float) -> str:
    """``1.314`` as "+31 %"."""
    return f"{100 * (ratio - 1):+.0f} %"


def seconds(value: float) -> str:
    """``0.0123`` as "12.3 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def name(policy: object) -> str:
    """What a policy or a rule is called."""
    return str(getattr(policy, "name", type(policy).__name__))


def reason(policy: object, measurement: Measurement, batch_size: int, proposal: float) -> str:
    """Why ``batch_size``, in the policy's words if it has any."""
    explain = getattr(policy, "reason", None)
    return f"{name(policy)} proposes {count(proposal)}" if explain is None else str(explain(measurement, batch_size))


def noise_scale(measurement: Measurement) -> str:
    """The noise scale with its interval where one is known: "noise scale 410 [350, 480]"."""
    if math.isnan(measurement.noise_scale):
        return "noise scale not identified"
    words = f"noise scale {count(measurement.noise_scale)}"
    low, high = measurement.interval
    if math.isnan(low) or math.isnan(high):
        return words
    return f"{words} [{count(low)}, {count(high)}]"
