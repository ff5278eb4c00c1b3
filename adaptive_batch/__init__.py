"""Adaptive batch sizes for PyTorch: the core, which needs PyTorch and NumPy only."""

from adaptive_batch.controller import BatchSizeController, Decision
from adaptive_batch.data import AdaptiveBatchSampler, make_adaptive
from adaptive_batch.history import Change, History, Update
from adaptive_batch.measurement import Measurement
from adaptive_batch.memory import MemoryModel
from adaptive_batch.micro_batching import register_splitter, split_batch
from adaptive_batch.noise import GradientNoiseScale
from adaptive_batch.replay import replay
from adaptive_batch.throughput import StepTimeModel
from adaptive_batch.trainers import FixedBatchTrainer, MiniBatchTrainer, SGDTrainer

__all__ = [
    "AdaptiveBatchSampler",
    "BatchSizeController",
    "Change",
    "Decision",
    "FixedBatchTrainer",
    "GradientNoiseScale",
    "History",
    "Measurement",
    "MemoryModel",
    "MiniBatchTrainer",
    "SGDTrainer",
    "StepTimeModel",
    "Update",
    "make_adaptive",
    "register_splitter",
    "replay",
    "split_batch",
]

__version__ = "0.1.0"
