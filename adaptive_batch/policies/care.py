"""Which policies the controller treats with care."""

from __future__ import annotations

from adaptive_batch.policies.cabs import CABS
from adaptive_batch.policies.combinators import Among, Around
from adaptive_batch.policies.goodput import Goodput
from adaptive_batch.policies.gradient_diversity import GradientDiversity
from adaptive_batch.policies.inner_product_test import InnerProductTest
from adaptive_batch.policies.loss_proportional import LossProportional
from adaptive_batch.policies.noise_scale import NoiseScale
from adaptive_batch.policies.norm_test import NormTest
from adaptive_batch.policies.resolve import Policy

__all__ = ["active_policy", "is_measured"]

_MEASURED = (CABS, Goodput, GradientDiversity, InnerProductTest, LossProportional, NoiseScale, NormTest)


def active_policy(policy: Policy) -> Policy:
    """The one whose proposal the last one was, where a policy chooses among several; otherwise itself."""
    return active_policy(policy.chosen) if isinstance(policy, Among) else policy


def is_measured(policy: Policy) -> bool:
    """Whether this is a built-in policy that follows noisy measurements: its changes need evidence.

    Of several it is the one that proposed last. ``BigBatch`` is none: it tests single batches, as its paper does,
    and its steps are small.
    """
    active = active_policy(policy)
    return is_measured(active.policy) if isinstance(active, Around) else isinstance(active, _MEASURED)
