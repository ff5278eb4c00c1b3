"""What a failed update leaves behind is put back, random numbers included."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

from adaptive_batch.transaction import Rollback

DRAWS: dict[str, Callable[[], float]] = {
    "uniform": lambda: float(np.random.random()),
    "normal, of which NumPy puts every second by": lambda: float(np.random.standard_normal()),
    "Python's uniform": random.random,
    "Python's normal, of which it puts every second by": lambda: random.gauss(0.0, 1.0),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_come_again_wherever_an_update_begins(draw: Callable[[], float]) -> None:
    np.random.seed(3)
    random.seed(3)
    rollback = Rollback(nn.Linear(1, 1))
    for before in (0, 1, 1, 0, 2, 1):  # from one update to the next, also an odd number or none
        for _ in range(before):
            draw()
        rollback.save(accumulated=False)
        first = [draw() for _ in range(3)]
        rollback.restore(gradients=False)
        assert [draw() for _ in range(3)] == first
        rollback.restore(gradients=False)
        rollback.forget()


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_random_numbers_come_again_from_another_generator_of_numpys(kind: Any) -> None:
    rollback = Rollback(nn.Linear(1, 1))
    rollback.save(accumulated=False)
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]  # numpy's stubs leave it out
    np.random.set_bit_generator(kind(5))  # type: ignore[attr-defined]
    try:
        rollback.save(accumulated=False)
        first = [np.random.random() for _ in range(3)]
        rollback.restore(gradients=False)
        assert [np.random.random() for _ in range(3)] == first
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]
