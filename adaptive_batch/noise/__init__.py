"""Estimating ``|G|^2``, ``tr(Sigma)`` and the gradient noise scale ``phi``."""

from __future__ import annotations

from adaptive_batch.noise.estimators import harmonic_mean, two_batch_estimate
from adaptive_batch.noise.intervals import (
    effective_count,
    fieller_interval,
    jackknife_covariance,
    student_t_quantile,
)
from adaptive_batch.noise.scale import GradientNoiseScale

__all__ = [
    "GradientNoiseScale",
    "effective_count",
    "fieller_interval",
    "harmonic_mean",
    "jackknife_covariance",
    "student_t_quantile",
    "two_batch_estimate",
]
