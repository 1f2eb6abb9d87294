"""Sources of samples with stable string keys."""

from softlabel.dataset.decoding import detect_decoding
from softlabel.dataset.huggingface import stored_bytes
from softlabel.dataset.open import open_source
from softlabel.dataset.report import report_source
from softlabel.dataset.source import Source, first_samples
from softlabel.dataset.subset import ReorderedSource, require_samples
from softlabel.dataset.tokenize import Tokenization, TokenizedSource, tokenize_source
from softlabel.dataset.torch_dataset import listed_labels

__all__ = [
    "ReorderedSource",
    "Source",
    "Tokenization",
    "TokenizedSource",
    "detect_decoding",
    "first_samples",
    "listed_labels",
    "open_source",
    "report_source",
    "require_samples",
    "stored_bytes",
    "tokenize_source",
]
