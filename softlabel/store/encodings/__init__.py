"""What a row of a store is: one file an encoding, and the table of their names."""

from softlabel.store.encodings.base import Encoding
from softlabel.store.encodings.float16 import Float16
from softlabel.store.encodings.float32 import Float32
from softlabel.store.encodings.head import Head
from softlabel.store.encodings.int8 import Int8
from softlabel.store.encodings.registry import register
from softlabel.store.encodings.sampled import Sampled
from softlabel.store.encodings.topk import TopK

__all__ = ["Encoding", "Float16", "Float32", "Head", "Int8", "Sampled", "TopK", "register"]
