"""What the controller has to know of a policy, which may be made of others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from adaptive_batch.measurement import Measurement
from adaptive_batch.policies.cabs import CABS
from adaptive_batch.policies.constant import Constant
from adaptive_batch.policies.goodput import Goodput
from adaptive_batch.policies.gradient_diversity import GradientDiversity
from adaptive_batch.policies.inner_product_test import InnerProductTest
from adaptive_batch.policies.loss_proportional import LossProportional
from adaptive_batch.policies.noise_scale import NoiseScale
from adaptive_batch.policies.norm_test import NormTest
from adaptive_batch.policies.resolve import Policy

__all__ = ["Combined", "active_policy", "bounded", "constant_size", "is_measured"]

_MEASURED = (CABS, Goodput, GradientDiversity, InnerProductTest, LossProportional, NoiseScale, NormTest)

Answer = Callable[[Policy, Measurement], float]
"""Asks a policy: ``(policy, measurement) -> proposal``."""


class Combined(ABC):
    """A policy made of others, one of which answers for each proposal.

    Attributes:
        chosen: the one that answers for the last proposal.
    """

    chosen: Policy

    def propose(self, measurement: Measurement) -> float:
        """Returns the global batch size in samples that the combination proposes."""
        return self.propose_with(measurement, lambda policy, asked: float(policy.propose(asked)))

    @abstractmethod
    def propose_with(self, measurement: Measurement, answer: Answer) -> float:
        """Returns the proposal where ``answer`` asks the members."""

    @abstractmethod
    def constant_size(self, reference_batch_size: int) -> float | None:
        """Returns the size that is proposed whatever is measured; ``None`` where there is none."""

    @abstractmethod
    def bounded(self, batch_size: float, present: int) -> float:
        """Returns what is left of ``batch_size`` at the ``present`` one, were it the chosen policy's proposal."""


def active_policy(policy: Policy) -> Policy:
    """The one whose proposal the last one was, where a policy is made of others; otherwise itself."""
    return active_policy(policy.chosen) if isinstance(policy, Combined) else policy


def bounded(policy: Policy, batch_size: float, present: int) -> float:
    """What the combinations around the active policy leave of ``batch_size``, a step that it has not proposed."""
    if not isinstance(policy, Combined):
        return batch_size
    return policy.bounded(bounded(policy.chosen, batch_size, present), present)


def constant_size(policy: Policy, reference_batch_size: int) -> float | None:
    """The size that a policy proposes whatever is measured; ``None`` where there is none."""
    if isinstance(policy, Combined):
        return policy.constant_size(reference_batch_size)
    return policy.constant_size(reference_batch_size) if isinstance(policy, Constant) else None


def is_measured(policy: Policy) -> bool:
    """Whether this is a built-in policy that follows noisy measurements: its changes need evidence.

    Of a combination it is the one that proposed last. ``BigBatch`` is none: it tests single batches, as its paper does,
    and its steps are small.
    """
    return isinstance(active_policy(policy), _MEASURED)
