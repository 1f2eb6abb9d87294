"""Rows of a store as probabilities, in any encoding, at the store's temperature or another one.

Legend: R rows, C classes, M members, W elements of a column in one row.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from softlabel.labels.combine import normalized_weights, retemperable
from softlabel.store.columns import Array, Columns
from softlabel.store.encodings import Float16, Float32
from softlabel.store.reader import Store

LOG2_E = 1.4426950408889634


class LabelReader:
    """Decodes columns of a store's encoding.

    Members that the store keeps apart are combined as a student takes them when nothing else is asked for: by the mean
    of their probabilities at that temperature, with the weights of the run.

    Attributes:
        run: of the store.
        members: M of a row; 1 unless the store keeps its members apart.
        judged: the temperature at which the labels are judged: 1, or the store's where only that one is exact.
        columns: names of the encoding's columns.
        is_drawn: whether a row holds classes drawn at random, which do not determine the most probable one.
    """

    def __init__(self, store: Store) -> None:
        self.run = store.run
        self.members = self.run.members_stored
        self.weights = normalized_weights(self.run.combine.weights or None, self.members) if self.run.kept else (1.0,)
        self.judged = 1.0 if self.is_exact_at(1.0) else self.run.temperature
        self.columns = tuple(column.name for column in self.run.label_columns)
        self.is_drawn = self.run.encoding.drawn
        self._extra: Mapping[str, Array] | None = store.extra
        # A store in these encodings has the numbers themselves; torch converts them faster than numpy.
        self._is_plain = isinstance(self.run.encoding, Float16 | Float32)

    def is_exact_at(self, temperature: float) -> bool:
        """Whether the stored labels determine those of this temperature."""
        run = self.run
        if temperature == run.temperature:
            return True
        return (
            retemperable(run.combine.rule, len(run.members))
            and run.encoding.knows(temperature)
            and not run.encoding.drawn
        )

    def read_logits(
        self, columns: Columns, temperature: float, *, unit: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """Logits divided by `temperature`, of a softmax up to a constant per row: float32 (R, M, C).

        Args:
            columns: of the encoding, (R, W) each.
            temperature: one that `is_exact_at` accepts.
            unit: what they are multiplied by besides, such as `LOG2_E` for logarithms to the base 2.
            out: memory for them; None: new one.
        """
        run = self.run
        shape = (-1, self.members, run.num_classes)
        factor = run.temperature / temperature
        if self._is_plain:
            stored = torch.from_numpy(_own(columns["logits"])).reshape(shape)
        else:
            stored_columns = {name: columns[name] for name in self.columns}
            at = run.temperature
            if factor != 1 and (retempered := run.encoding.retemper(stored_columns, factor)) is not None:
                stored_columns, at, factor = retempered, temperature, 1.0
            decoded = run.encoding.decode(
                stored_columns,
                num_classes=run.num_classes,
                temperature=at,
                members=self.members,
                kept=run.kept,
                extra=self._extra,
            )
            stored = torch.from_numpy(_own(decoded)).reshape(shape)
        out = torch.empty(stored.shape) if out is None else out
        return out.copy_(stored).mul_(factor * unit)

    def read_member_probabilities(self, columns: Columns, temperature: float) -> Tensor:
        """Probabilities of each member, float32 (R, M, C)."""
        logits_RMC = self.read_logits(columns, temperature)
        if self.run.activation == "sigmoid":
            return logits_RMC.sigmoid_()
        return torch.softmax(logits_RMC, dim=-1)

    def read_probabilities(self, columns: Columns, temperature: float) -> Tensor:
        """Probabilities of the labels, members combined, float32 (R, C)."""
        return self.combine(self.read_member_probabilities(columns, temperature))

    def combine(self, probabilities_RMC: Tensor) -> Tensor:
        """The weighted mean over the members, (R, C)."""
        if self.members == 1:
            return probabilities_RMC[:, 0]
        weights_M = torch.tensor(self.weights, dtype=probabilities_RMC.dtype)
        return torch.einsum("rmc,m->rc", probabilities_RMC, weights_M)


def _own(array: Array) -> Array:
    """Memory that torch may take: it refuses arrays that are read-only."""
    return array if array.flags.writeable and array.flags.c_contiguous else np.array(array)
