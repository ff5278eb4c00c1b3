"""Estimating ``|G|^2``, ``tr(Sigma)`` and the gradient noise scale ``phi``."""

from __future__ import annotations

from adaptive_batch.noise.adam_moments import AdamMomentsSource
from adaptive_batch.noise.estimators import harmonic_mean, two_batch_estimate
from adaptive_batch.noise.inner_products import InnerProducts, inner_product_variance
from adaptive_batch.noise.intervals import fieller_interval, student_t_quantile
from adaptive_batch.noise.per_example import NORM_LAYERS, PerExampleNorms, Unmeasurable
from adaptive_batch.noise.preconditioning import AdamMetric
from adaptive_batch.noise.sample import Batches, NoiseSample, equivalent_sample, ranks_sample
from adaptive_batch.noise.scale import GradientNoiseScale
from adaptive_batch.noise.sources import (
    SOURCES,
    DifferencedSource,
    MicroBatchSource,
    NoiseSource,
    PerExampleSource,
    RankSource,
    choose_source,
)

__all__ = [
    "NORM_LAYERS",
    "SOURCES",
    "AdamMetric",
    "AdamMomentsSource",
    "Batches",
    "DifferencedSource",
    "GradientNoiseScale",
    "InnerProducts",
    "MicroBatchSource",
    "NoiseSample",
    "NoiseSource",
    "PerExampleNorms",
    "PerExampleSource",
    "RankSource",
    "Unmeasurable",
    "choose_source",
    "equivalent_sample",
    "fieller_interval",
    "harmonic_mean",
    "inner_product_variance",
    "ranks_sample",
    "student_t_quantile",
    "two_batch_estimate",
]
