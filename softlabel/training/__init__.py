"""Stage 2: students learn from hard and soft labels.

TrainConfig -> loader -> students, each with its loss and optimiser -> run folders (metrics, checkpoint, weights)
"""

from softlabel.training.config import TrainConfig
from softlabel.training.metrics import EpochMetrics
from softlabel.training.summary import StudentResult, TrainResult
from softlabel.training.train import train

__all__ = ["EpochMetrics", "StudentResult", "TrainConfig", "TrainResult", "train"]
