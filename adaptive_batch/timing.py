"""Time between two points of a run, on the host or on an accelerator, without waiting for either."""

from __future__ import annotations

import time

import torch

__all__ = ["Elapsed", "Mark", "mark"]

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """The present moment in the device's own order of work; recording it does not synchronise."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no annotation
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter()


class Elapsed:
    """Seconds between two marks, ``float(elapsed)``; waits for the device only when it is read."""

    __slots__ = ("_start", "_stop", "_wait")

    def __init__(self, start: Mark, stop: Mark, wait: float = 0.0) -> None:
        self._start, self._stop, self._wait = start, stop, wait

    def __float__(self) -> float:
        start, stop = self._start, self._stop
        if isinstance(start, float) or isinstance(stop, float):
            assert isinstance(start, float) and isinstance(stop, float)  # marks of one device
            return stop - start + self._wait
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 + self._wait
