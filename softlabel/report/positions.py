"""A few numbers for each labelled position of documents, from what its label says about every token.

Legend: P positions, R some of them, C tokens of the vocabulary, M members, K kept tokens, W elements of a column.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.report.probabilities import LabelReader
from softlabel.report.sharpness import SURE
from softlabel.store.columns import Array, Columns
from softlabel.store.encodings import TopK

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
_SLICE = 1 << 19  # numbers that exist at a time
_LOWEST = -1e4  # a logit without any probability


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedPositions:
    """Of P positions.

    Attributes:
        top: the most probable token at `LabelReader.judged`, int64 (P,); of equal ones the first.
        nll: -log p(next token) there, in nats, float64 (P,); NaN without a next token.
        named: whether the label, of members that are kept apart one of theirs, names the next token, bool (P,).
        entropy: by temperature, in nats, float64 (P,); NaN where the label holds numbers that are not finite.
        sure: by temperature, whether a probability is above 0.999, bool (P,).
        kept: by temperature, how much of the probability the named tokens have, float64 (P,), mean over the members;
            of labels of all tokens empty.
        information: mutual information of the members, in nats, float64 (P,); None unless they are kept.
    """

    top: I64
    nll: F64
    named: NDArray[np.bool_]
    entropy: Mapping[float, F64]
    sure: Mapping[float, NDArray[np.bool_]]
    kept: Mapping[float, F64]
    information: F64 | None


class PositionJudge:
    """Judges labels of positions; several threads may share one.

    Attributes:
        temperatures: 1, where that is exact, and the store's, rising.
    """

    def __init__(self, reader: LabelReader) -> None:
        stored = reader.run.temperature
        self._reader = reader
        self.temperatures = tuple(sorted({stored, 1.0} if reader.is_exact_at(1.0) else {stored}))

    def judge(self, columns: Columns, next_P: I64) -> JudgedPositions:
        """Judge positions.

        Args:
            columns: of the encoding, (P, W).
            next_P: the next token of each, negative for none.
        """
        run = self._reader.run
        is_sparse = isinstance(run.encoding, TopK) and self._reader.members == 1
        numbers = run.encoding.k if isinstance(run.encoding, TopK) and is_sparse else run.num_classes
        step = max(1, _SLICE // (numbers * self._reader.members))
        judge_part = self._judge_kept if is_sparse else self._judge_all
        parts = [
            judge_part({name: columns[name][start : start + step] for name in self._reader.columns}, next_P[start:])
            for start in range(0, max(1, len(next_P)), step)
        ]

        def join(name: str) -> Mapping[float, NDArray[np.generic]]:
            found = [getattr(part, name) for part in parts]
            return {at: np.concatenate([one[at] for one in found]) for at in found[0]}

        informed = [part.information for part in parts if part.information is not None]
        return JudgedPositions(
            top=np.concatenate([part.top for part in parts]),
            nll=np.concatenate([part.nll for part in parts]),
            named=np.concatenate([part.named for part in parts]),
            entropy=join("entropy"),  # type: ignore[arg-type]
            sure=join("sure"),  # type: ignore[arg-type]
            kept=join("kept"),  # type: ignore[arg-type]
            information=np.concatenate(informed) if informed else None,
        )

    def _judge_all(self, columns: dict[str, Array], next_P: I64) -> JudgedPositions:
        """Of the probabilities of all tokens."""
        rows = len(next(iter(columns.values())))
        next_R = next_P[:rows]
        is_truncated = isinstance(self._reader.run.encoding, TopK)
        entropy, sure, kept = {}, {}, {}
        top_R, nll_R, information_R = np.zeros(rows, np.int64), np.full(rows, np.nan), None
        for at in self.temperatures:
            logits_RMC = self._reader.read_logits(columns, at)
            log_p_RMC = torch.log_softmax(logits_RMC, dim=-1)
            p_RMC = log_p_RMC.exp()
            p_RC = self._reader.combine(p_RMC)
            entropy[at] = _sum_entropy(p_RC, log_p_RMC[:, 0] if self._reader.members == 1 else p_RC.log()).numpy()
            sure[at] = (p_RC.amax(dim=1) > SURE).numpy()
            if is_truncated:
                kept[at] = self._measure_kept(columns, at)
            if at == self._reader.judged:
                top_R = p_RC.numpy().argmax(axis=1)
                has_R = np.flatnonzero(next_R >= 0)
                # Of logarithms: the mean of probabilities leaves float32's range where members are sure.
                of_next_RM = log_p_RMC.numpy()[has_R, :, next_R[has_R]].astype(np.float64)
                nll_R[has_R] = -np.logaddexp.reduce(of_next_RM + np.log(self._reader.weights), axis=1)
                if self._reader.members > 1:
                    weights_M = torch.tensor(self._reader.weights, dtype=torch.float64)
                    information_R = entropy[at] - (_sum_entropy(p_RMC, log_p_RMC) @ weights_M).numpy()
        return JudgedPositions(
            top=top_R,
            nll=nll_R,
            named=(columns["index"].astype(np.int64) == next_R[:, None]).any(axis=1) if is_truncated else next_R >= 0,
            entropy=entropy,
            sure=sure,
            kept=kept,
            information=None if information_R is None else np.maximum(information_R, 0.0),
        )

    def _measure_kept(self, columns: dict[str, Array], at: float) -> F64:
        """How much of the probability the tokens have that top-k labels name, mean over the members, float64 (R,)."""
        run, rows = self._reader.run, len(columns["value"])
        value_RMK = columns["value"].reshape(rows, self._reader.members, -1).astype(np.float64)
        tail_RM = columns["tail"].reshape(rows, self._reader.members, -1)[..., self._find_tail(at)].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            power_RM = np.exp(value_RMK * (run.temperature / at)).sum(axis=2)
            found: F64 = (power_RM / (power_RM + np.exp(tail_RM))) @ np.array(self._reader.weights)
        return found

    def _find_tail(self, at: float) -> int:
        """Which of the tails of top-k labels is that of a temperature."""
        declared = self._reader.run.encoding.declared
        assert declared is not None
        return next(n for n, one in enumerate(declared) if np.isclose(one, at, rtol=1e-6, atol=0))

    def _judge_kept(self, columns: dict[str, Array], next_P: I64) -> JudgedPositions:
        """Of the tokens that a top-k label names, and what all others have together."""
        run = self._reader.run
        assert isinstance(run.encoding, TopK)
        index_RK, value_RK = columns["index"].astype(np.int64), columns["value"].astype(np.float64)
        next_R, rows_R = next_P[: len(index_RK)], np.arange(len(index_RK))
        others = max(1, run.num_classes - index_RK.shape[1])  # of which each has as much
        entropy, sure, kept = {}, {}, {}
        nll_R, highest_R = np.full(len(index_RK), np.nan), value_RK.max(axis=1)
        matches_RK = index_RK == next_R[:, None]
        named_R = matches_RK.any(axis=1)
        for at in self.temperatures:
            scaled_RK = value_RK * (run.temperature / at)
            tail_R = columns["tail"][:, self._find_tail(at)].astype(np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                power_RK = np.exp(scaled_RK)
                kept_R = power_RK.sum(axis=1)  # of which the largest is 1
                all_R = np.logaddexp(np.log(kept_R), tail_R)
                log_rest_R = tail_R - all_R
                share_R, rest_R = np.exp(-all_R), np.exp(log_rest_R)
                # Of p log p; what has no probability counts nothing, as its logit is not -inf here.
                of_kept_R = ((power_RK * np.maximum(scaled_RK, _LOWEST)).sum(axis=1) - all_R * kept_R) * share_R
                of_rest_R = np.where(rest_R > 0, rest_R * (log_rest_R - np.log(others)), 0.0)
            is_number_R = ~np.isnan(all_R)
            entropy[at] = np.where(is_number_R, np.maximum(-of_kept_R - of_rest_R, 0.0), np.nan)
            sure[at] = share_R > SURE
            kept[at] = kept_R * share_R
            if at == self._reader.judged:
                of_named_R = scaled_RK[rows_R, matches_RK.argmax(axis=1)] - all_R
                of_next_R = np.where(named_R, of_named_R, log_rest_R - np.log(others))
                nll_R = np.where(next_R >= 0, np.maximum(-of_next_R, 0.0), np.nan)
        top_R = np.where(value_RK == highest_R[:, None], index_RK, run.num_classes).min(axis=1)
        return JudgedPositions(
            top=np.minimum(top_R, run.num_classes - 1),
            nll=nll_R,
            named=named_R,
            entropy=entropy,
            sure=sure,
            kept=kept,
            information=None,
        )


def _sum_entropy(p: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Entropy over the last axis, float64; what has no probability counts nothing."""
    return -(p * log_p.clamp_min(_LOWEST)).sum(dim=-1, dtype=torch.float64)
