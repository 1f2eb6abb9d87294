"""Stage 2: students learn from hard and soft labels.

TrainConfig -> loader -> students, each with its loss and optimiser -> run folders (metrics, checkpoint, weights)
"""

from softlabel.train.config import TrainConfig
from softlabel.train.loop import train
from softlabel.train.metrics import EpochMetrics
from softlabel.train.summary import StudentResult, TrainResult

__all__ = ["EpochMetrics", "StudentResult", "TrainConfig", "TrainResult", "train"]
