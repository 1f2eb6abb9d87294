"""Stage 2: a student learns from hard and soft labels.

TrainConfig -> loader -> student -> loss -> optimiser -> run folder (metrics, checkpoint, weights)
"""

from softlabel.train.config import TrainConfig
from softlabel.train.loop import TrainResult, train
from softlabel.train.metrics import EpochMetrics

__all__ = ["EpochMetrics", "TrainConfig", "TrainResult", "train"]
