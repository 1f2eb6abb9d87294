"""The teacher's side of encodings: from scaled logits to the columns of a store, and what that costs."""

from softlabel.labels.encodings.base import Answers, Coder, Reading
from softlabel.labels.encodings.registry import decode, encode, measure, register

__all__ = ["Answers", "Coder", "Reading", "decode", "encode", "measure", "register"]
