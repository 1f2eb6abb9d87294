"""The student's data: images joined to their soft labels by key, as whole batches, in an order that can be resumed.

order -> samples -> images (decoded once, then cached) -> view -> Batch
                 -> rows of the store, found by key   -> target ^
"""

from softlabel.loader.adapters import LabelJoin, SoftLabelled, with_soft_labels
from softlabel.loader.batch import Batch
from softlabel.loader.dataset import JoinedDataset
from softlabel.loader.join import Missing
from softlabel.loader.loader import SoftLabelLoader

__all__ = [
    "Batch",
    "JoinedDataset",
    "LabelJoin",
    "Missing",
    "SoftLabelLoader",
    "SoftLabelled",
    "with_soft_labels",
]
