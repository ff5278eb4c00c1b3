"""Lightning callbacks."""

from adaptive_batch.callbacks.adaptive_batch_size import AdaptiveBatchSize

__all__ = ["AdaptiveBatchSize"]
