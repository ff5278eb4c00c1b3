"""What all tests share: seeds, quiet libraries, and the tests that need a GPU."""

from __future__ import annotations

import logging
import os
import random

import hypothesis
import numpy as np
import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"  # no windows, also in processes that tests start

# Lightning's banners (devices, tips, why a run ended). Its warnings are not logged here and stay.
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)

# The same examples in every run, and no failure because a machine is slow.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# The tests' models are too small to share: one thread is faster, and rounds the same on every machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test marked `cuda` where there is no GPU."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Starts every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
