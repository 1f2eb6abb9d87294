"""What every language model has here: a body, a last layer apart from it where it has one, and a vocabulary.

    hidden_BLD = model.hidden(input_ids, attention_mask)
    logits_PV = model.logits(hidden_BLD[rows, positions])      in as many pieces as the memory wants

Legend: B batch, D width, L positions, P some positions, V tokens.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlabel.common.spec import Spec
from softlabel.errors import SpecError
from softlabel.inputs.tokenizer import TOKENIZER
from softlabel.inputs.vocabulary import Vocabulary

_TOLERANCE = 1e-4  # relative to the largest of the numbers that are compared


class LanguageModel(nn.Module, ABC):
    """A causal language model.

    Attributes:
        network: its weights are those of the model.
        vocabulary: its tokens; `vocabulary.size` is V.
        logit_scale: that the last layer's answer is multiplied with.
        softcap: c of c tanh(logits / c), after the scale; None for none.
    """

    def __init__(
        self, network: Any, vocabulary: Vocabulary, *, logit_scale: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.vocabulary = vocabulary
        self.logit_scale, self.softcap = logit_scale, softcap

    @abstractmethod
    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """What goes into the last layer; of a network without one that is apart, its logits.

        Args:
            input_ids: int64 (B, L).
            attention_mask: int64 (B, L), 1 where there is a token. Padding is on the right, so that a network whose
                positions see no later one may leave it out of account.
            position_ids: int64 (B, L), for several documents in a row instead of `attention_mask`: they count from 0 in
                each, and none sees another.

        Returns:
            (B, L, D), or logits (B, L, V).
        """

    @property
    @abstractmethod
    def last_layer(self) -> nn.Module | None:
        """The layer, with the rows to which it is padded; None where logits are all that the network gives."""

    @property
    @abstractmethod
    def longest(self) -> int | None:
        """How many positions it takes; None for any number."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the network is, for messages."""

    def files(self) -> dict[str, bytes]:
        """What a run folder has beside the weights, by the names of the files."""
        return self.vocabulary.files()

    @property
    def head_weight(self) -> Tensor:
        """(V, D), without the rows to which a last layer is padded."""
        assert self.last_layer is not None
        return self._cut(self.last_layer.weight)  # type: ignore[arg-type]

    @property
    def head_bias(self) -> Tensor | None:
        """(V,), or None."""
        assert self.last_layer is not None
        bias: Any = self.last_layer.bias
        return None if bias is None else self._cut(bias)

    def _cut(self, rows: Tensor) -> Tensor:
        return rows if len(rows) == self.vocabulary.size else rows[: self.vocabulary.size]

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits (P, V) of the vocabulary's tokens, or (..., V) of (..., D)."""
        if self.last_layer is None:
            return hidden_PD
        logits = F.linear(hidden_PD, self.head_weight, self.head_bias)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) at all positions; `mask`, which `TokenTransform` gives as well, changes none of them."""
        return self.logits(self.hidden(input_ids, attention_mask))


def make_probe(length: int, size: int) -> Tensor:
    """Ids (2, L) of two documents that differ in their last token."""
    first_L = torch.arange(length) * 7919 % size
    other_L = first_L.clone()
    other_L[-1] = (other_L[-1] + 1) % size
    return torch.stack([first_L, other_L])


def differ(ours: Tensor, theirs: Tensor) -> float | None:
    """By how much two answers differ, where that is more than rounding; NaN where one of them is not a number."""
    off = float(torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max())  # equal infinities do not differ
    largest = float(torch.where(theirs.isfinite(), theirs.abs(), 0.0).max())
    return None if off <= _TOLERANCE * max(1.0, largest) else off


def refuse_not_finite(spec: Spec, logits: Tensor, title: str) -> None:
    """Raises SpecError where a position has no finite largest logit; -inf is a token that never comes."""
    if not logits.amax(dim=-1).isfinite().all():  # NaN is the largest of all
        raise SpecError(
            f"{spec.text}: expected finite logits, found that those of {title} are not finite (NaN or infinite) on a "
            "probe; look at its weights"
        )


def refuse_few_rows(spec: Spec, rows: int, size: int, remedy: str) -> None:
    """Raises SpecError for a last layer that does not have all tokens."""
    if rows < size:
        raise SpecError(
            f"{spec.text}: expected a last layer of at least {size} rows, one for each token of {TOKENIZER}, found "
            f"{rows}; {remedy}"
        )


def refuse_size(spec: Spec, found: int, needed: int | None) -> None:
    """Raises SpecError for a vocabulary of another size than is needed."""
    if needed not in (None, found):
        raise SpecError(
            f"{spec.text}: has a vocabulary of {found} tokens, but {needed} are needed here; give a network with the "
            "tokenizer that the labels were made with"
        )


def measure_leak(model: LanguageModel) -> float | None:
    """How far hidden states of documents side by side in one row are from those of each alone, on a probe; None where
    documents do not see each other."""
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    ids_L = torch.arange(6, device=device) * 7919 % model.vocabulary.size
    positions_BL = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed_LD = model.hidden(ids_L[None], None, positions_BL)[0]
            alone = [model.hidden(part[None], torch.ones_like(part[None]))[0] for part in (ids_L[:3], ids_L[3:])]
    finally:
        model.train(was_training)
    return differ(torch.cat(alone), packed_LD)


def check_packing(spec: Spec, model: LanguageModel) -> None:
    """Raises SpecError where documents side by side in one row would see each other."""
    if (far := measure_leak(model)) is not None:
        if math.isnan(far):
            raise SpecError(
                f"{spec.text}: expected finite answers for several documents in one row, found NaN from {model.title} "
                "on a probe; train without packing"
            )
        raise SpecError(
            f"{spec.text}: expected documents in one row to be apart, found that those of {model.title} see each other "
            f"(off by {far:.2g} on a probe); train without packing"
        )
