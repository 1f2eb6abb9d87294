"""head on the teacher's side.

R rows, D width of the teacher's last hidden layer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from softlabel.labels.encodings.base import Answers, Coder, Reading
from softlabel.store.encodings import Head


def encode(encoding: Head, answers: Answers) -> dict[str, Tensor]:
    """float16 (R, D), or int8 (R, D) and a scale (R, 1) of its own for each row."""
    assert answers.hidden is not None
    if encoding.hidden == "float16":
        return {"hidden": answers.hidden.half()}
    hidden_RD = answers.hidden.float()
    scale_R1 = (hidden_RD.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return {"hidden": (hidden_RD / scale_R1).round().to(torch.int8), "hidden_scale": scale_R1}


def decode(encoding: Head, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    assert reading.head is not None
    hidden_RD = columns["hidden"].double()
    if "hidden_scale" in columns:
        hidden_RD = hidden_RD * columns["hidden_scale"].double()
    weight_CD, bias_C = reading.head
    logits_RC = hidden_RD @ weight_CD.double().T + bias_C.double()
    if encoding.softcap is not None:
        logits_RC = encoding.softcap * torch.tanh(logits_RC / encoding.softcap)
    return logits_RC / reading.at


CODER = Coder(encode=encode, decode=decode)
