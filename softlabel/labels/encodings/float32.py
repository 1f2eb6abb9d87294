"""float32 on the teacher's side."""

from torch import Tensor

from softlabel.labels.encodings.base import Answers, Coder, decode_dense
from softlabel.store.encodings import Float32


def encode(encoding: Float32, answers: Answers) -> dict[str, Tensor]:
    return {"logits": answers.scaled_logits.float()}


CODER = Coder(encode=encode, decode=decode_dense)
