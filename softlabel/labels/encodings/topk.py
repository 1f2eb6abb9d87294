"""topk on the teacher's side.

R rows, C classes, K kept classes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from softlabel.labels.encodings.base import Answers, Coder, Reading, to_half, to_ids
from softlabel.store.encodings import TopK
from softlabel.store.encodings.base import find_temperature


def encode(encoding: TopK, answers: Answers) -> dict[str, Tensor]:
    scaled_logits_RC = answers.scaled_logits
    num_classes = scaled_logits_RC.shape[1]
    value_RK, index_RK = scaled_logits_RC.topk(encoding.kept(num_classes), dim=1)
    others_RC = scaled_logits_RC.double().scatter(1, index_RK, -torch.inf)
    tails = [torch.logsumexp(others_RC * (answers.temperature / t), dim=1) for t in encoding.temperatures]
    return {
        "index": to_ids(index_RK, num_classes),
        "value": to_half(value_RK),
        "tail": torch.stack(tails, dim=1).float(),
    }


def decode(encoding: TopK, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    place, factor = find_temperature(encoding.temperatures, reading.at), 1.0
    if place is None:  # the tail is taken from the store's temperature there, as if it were one class
        place, factor = find_temperature(encoding.temperatures, reading.temperature), reading.factor
    assert place is not None, reading
    left_out = max(1, reading.num_classes - encoding.kept(reading.num_classes))
    even_R1 = (columns["tail"][:, place : place + 1].double() - math.log(left_out)) * factor
    value_RK = columns["value"].double() * reading.factor
    return even_R1.repeat(1, reading.num_classes).scatter_(1, columns["index"].long(), value_RK)


CODER = Coder(encode=encode, decode=decode)
