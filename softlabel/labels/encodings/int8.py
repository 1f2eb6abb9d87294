"""int8 on the teacher's side.

R rows, C classes, X exact classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from softlabel.labels.encodings.base import Answers, Coder, Reading, to_half, to_ids
from softlabel.store.encodings import Int8
from softlabel.store.encodings.int8 import EXACT

# The 255 steps are spent on the logits within this distance of the row's maximum, in logits at temperature 1 (and at
# least a quarter of it after scaling): further down a class has no probability at any temperature in use.
# Of independent sigmoids they are spent on the logits within this distance of 0.
_RANGE = 128.0


def encode(encoding: Int8, answers: Answers) -> dict[str, Tensor]:
    scaled_logits_RC = answers.scaled_logits.float()
    num_classes = scaled_logits_RC.shape[1]
    top_value_RX, top_index_RX = scaled_logits_RC.topk(min(EXACT, num_classes), dim=1)
    lowest = -_RANGE / min(answers.temperature, 4.0)
    others_RC = scaled_logits_RC.clamp(lowest, -lowest).scatter(1, top_index_RX, torch.nan)
    high_R1 = others_RC.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)
    low_R1 = others_RC.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    scale_R1 = (high_R1 - low_R1) / 254
    scale_R1 = torch.where(scale_R1 > 0, scale_R1, 1.0)
    offset_R1 = (high_R1 + low_R1) / 2
    steps_RC = ((others_RC - offset_R1) / scale_R1).round().clamp(-127, 127)
    return {
        "q": steps_RC.nan_to_num(nan=127.0).to(torch.int8),
        "scale": scale_R1,
        "offset": offset_R1,
        "top_index": to_ids(top_index_RX, num_classes),
        "top_value": to_half(top_value_RX),
    }


def decode(encoding: Int8, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    logits_RC = columns["q"].double() * columns["scale"].double() + columns["offset"].double()
    logits_RC.scatter_(1, columns["top_index"].long(), columns["top_value"].double())
    return logits_RC * reading.factor


CODER = Coder(encode=encode, decode=decode)
