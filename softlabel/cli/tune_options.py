"""Options of `tune`: its own, and those of `train` that all students of a search share."""

from softlabel.cli.crossfit_options import TrainingOptions, pick_fields
from softlabel.training.config import TrainConfig
from softlabel.training.tune_config import TRAINING

_TEXTS = {
    "seed": "of the search, and of the weights, the order and the augmentation of every student.",
    "epochs": "passes over the data of the students that are trained to the end.",
}

OfTuning = pick_fields(TrainingOptions, TrainConfig, TRAINING, _TEXTS)
