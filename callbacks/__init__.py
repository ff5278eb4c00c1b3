"""Lightning callbacks."""

from adaptive_batch.callbacks.adaptive_batch_size import AdaptiveBatchSize
from adaptive_batch.callbacks.gradient_noise_monitor import GradientNoiseMonitor

__all__ = ["AdaptiveBatchSize", "GradientNoiseMonitor"]
