"""softlabel: offline soft labels for knowledge distillation.

Run the teachers over a dataset once (`generate`), keep their scaled logits in a store that is checked byte by byte,
and train any number of students from it (`SoftLabelLoader`, `DistillationLoss`, `train`).

Names are imported when first used, so that `import softlabel` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from softlabel.common.version import VERSION

if TYPE_CHECKING:
    from softlabel.dataset import Source, open_source
    from softlabel.errors import SoftLabelError
    from softlabel.evaluation.evaluate import evaluate
    from softlabel.evaluation.metrics import Evaluation
    from softlabel.generation.generate import generate
    from softlabel.generation.run import GenerateSummary
    from softlabel.loader import LabelJoin, SoftLabelLoader, with_soft_labels
    from softlabel.loss import DistillationLoss, distillation_loss
    from softlabel.maintain.calibrate import calibrate
    from softlabel.report.write import WrittenReport, write_report
    from softlabel.store.open import open_store
    from softlabel.store.reader import Store
    from softlabel.store.verify import verify_store
    from softlabel.training import TrainConfig, TrainResult, train
    from softlabel.training.crossfit import crossfit
__version__ = VERSION

__all__ = [
    "DistillationLoss",
    "Evaluation",
    "GenerateSummary",
    "LabelJoin",
    "SoftLabelError",
    "SoftLabelLoader",
    "Source",
    "Store",
    "TrainConfig",
    "TrainResult",
    "WrittenReport",
    "calibrate",
    "crossfit",
    "distillation_loss",
    "evaluate",
    "generate",
    "open_source",
    "open_store",
    "train",
    "verify_store",
    "with_soft_labels",
    "write_report",
]

_HOME = {
    "DistillationLoss": "softlabel.loss",
    "Evaluation": "softlabel.evaluation.metrics",
    "GenerateSummary": "softlabel.generation.run",
    "LabelJoin": "softlabel.loader",
    "SoftLabelError": "softlabel.errors",
    "SoftLabelLoader": "softlabel.loader",
    "Source": "softlabel.dataset",
    "Store": "softlabel.store.reader",
    "TrainConfig": "softlabel.training",
    "TrainResult": "softlabel.training",
    "WrittenReport": "softlabel.report.write",
    "calibrate": "softlabel.maintain.calibrate",
    "crossfit": "softlabel.training.crossfit",
    "distillation_loss": "softlabel.loss",
    "evaluate": "softlabel.evaluation.evaluate",
    "generate": "softlabel.generation.generate",
    "open_source": "softlabel.dataset",
    "open_store": "softlabel.store.open",
    "train": "softlabel.training",
    "verify_store": "softlabel.store.verify",
    "with_soft_labels": "softlabel.loader",
    "write_report": "softlabel.report.write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'softlabel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
