"""Lightning callbacks."""

from adaptive_batch.callbacks.adaptive_batch_size import AdaptiveBatchSize
from adaptive_batch.callbacks.auto_micro_batch import AutoMicroBatch
from adaptive_batch.callbacks.gradient_noise_monitor import GradientNoiseMonitor
from adaptive_batch.callbacks.memory_monitor import MemoryMonitor

__all__ = ["AdaptiveBatchSize", "AutoMicroBatch", "GradientNoiseMonitor", "MemoryMonitor"]
