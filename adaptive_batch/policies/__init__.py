"""What batch size next: one small class per published rule.

A policy turns a :class:`~adaptive_batch.measurement.Measurement` into a global batch size. It only says
what its formula says; rounding, clamping, evidence and hysteresis are the controller's.
"""

from __future__ import annotations

from adaptive_batch.policies.big_batch import BigBatch
from adaptive_batch.policies.cabs import CABS
from adaptive_batch.policies.combinators import Clamp, Max, Min, OnlyGrow, Sequential
from adaptive_batch.policies.combined import Combined, active_policy, bounded, constant_size, is_measured
from adaptive_batch.policies.constant import Constant
from adaptive_batch.policies.critical_batch_warmup import CriticalBatchWarmup
from adaptive_batch.policies.decay import DontDecay, Seesaw
from adaptive_batch.policies.goodput import Goodput
from adaptive_batch.policies.gradient_diversity import GradientDiversity
from adaptive_batch.policies.growth import GeometricGrowth, LinearRamp
from adaptive_batch.policies.inner_product_test import InnerProductTest
from adaptive_batch.policies.loss_proportional import LossProportional
from adaptive_batch.policies.milestones import Milestones
from adaptive_batch.policies.noise_scale import NoiseScale
from adaptive_batch.policies.norm_test import NormTest
from adaptive_batch.policies.plateau import Plateau
from adaptive_batch.policies.resolve import FunctionPolicy, Policy, resolve_policy

__all__ = [
    "CABS",
    "BigBatch",
    "Clamp",
    "Combined",
    "Constant",
    "CriticalBatchWarmup",
    "DontDecay",
    "FunctionPolicy",
    "GeometricGrowth",
    "Goodput",
    "GradientDiversity",
    "InnerProductTest",
    "LinearRamp",
    "LossProportional",
    "Max",
    "Milestones",
    "Min",
    "NoiseScale",
    "NormTest",
    "OnlyGrow",
    "Plateau",
    "Policy",
    "Seesaw",
    "Sequential",
    "active_policy",
    "bounded",
    "constant_size",
    "is_measured",
    "resolve_policy",
]
