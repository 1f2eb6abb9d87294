"""Columns of encoding topk out of the log-probabilities that vLLM records of a prompt.

    output = LLM(FOLDER, enable_prefix_caching=False, max_logprobs=k).generate(...)[0]     prompt_logprobs=k
    columns = convert_prompt_logprobs(output.prompt_logprobs, output.prompt_token_ids, k=k, num_classes=...)

vLLM's entry t is about token t, given those before it; a store's position t is about what comes after token t. So entry
t + 1 is position t, the first entry is None, and the last position is absent: `positions` of the document is its length
less 1. Log-probabilities are known at temperature 1 alone.

Legend: L tokens of a document, P = L - 1 positions, K kept tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from softlabel.errors import DataError
from softlabel.labels.encodings.base import to_half
from softlabel.store.columns import Array, index_dtype

# The sum of float32 probabilities is not known better than this.
_ROUNDING = 2.0**-24
_SLACK = 1e-3


def convert_prompt_logprobs(
    recorded: Sequence[Mapping[Any, Any] | None], ids_L: Sequence[int], *, k: int, num_classes: int
) -> dict[str, Array]:
    """The columns of `TopK(k=k, temperatures=(1.0,))` of one document.

    Args:
        recorded: L entries, `prompt_logprobs` of a RequestOutput, or of the JSON of vLLM's server: None, then for each
            token a mapping from ids (or their digits) to `logprob` and `rank`, as attributes or in a mapping. It has
            the k largest, and the token itself where it is none of them, which is left out again.
        ids_L: the document's tokens.
        k: kept tokens, at most the `prompt_logprobs` that were asked for.
        num_classes: size of the vocabulary.

    Returns:
        `index` (P, K), `value` float16 (P, K), the log-probability less the row's largest, and `tail` float32 (P, 1),
        the logarithm of what the K leave, less the same.

    Raises:
        DataError: the entries are not those of these tokens, or a position lacks some.
    """
    if len(recorded) != len(ids_L):
        raise DataError(
            f"prompt_logprobs: expected one entry for each of {len(ids_L)} tokens, found {len(recorded)}; pass them as "
            "vLLM gives them, with the first one, and record with enable_prefix_caching=False"
        )
    if len(recorded) and recorded[0] is not None:
        raise DataError(
            "prompt_logprobs: expected None for the first token, before which nothing stands, found entries; pass "
            "prompt_logprobs of the prompt, not logprobs of what was generated"
        )
    kept = min(k, num_classes)
    index_PK = np.zeros((max(0, len(ids_L) - 1), kept), np.int64)
    log_p_PK = np.zeros(index_PK.shape)
    for place, (token, entry) in enumerate(zip(ids_L[1:], recorded[1:], strict=True)):
        index_PK[place], log_p_PK[place] = _read_entry(entry, int(token), place + 1, kept)
    if index_PK.size and not 0 <= index_PK.min() <= index_PK.max() < num_classes:
        raise DataError(
            f"prompt_logprobs: expected ids below {num_classes}, found {index_PK.max()}; record with the model of this "
            "vocabulary"
        )
    sums_P = np.exp(log_p_PK).sum(axis=1)
    if (wrong_P := ~(sums_P <= 1 + _SLACK)).any():
        place = int(wrong_P.argmax())
        raise DataError(
            f"prompt_logprobs: token {place + 1}: expected probabilities that sum up to at most 1, found "
            f"{sums_P[place]:.4g}; record with logprobs_mode='raw_logprobs'"
        )
    most_P = log_p_PK.max(axis=1, initial=-np.inf)
    left_P = np.full(len(sums_P), -np.inf) if kept == num_classes else np.log(np.maximum(1 - sums_P, _ROUNDING))
    return {
        "index": index_PK.astype(index_dtype(num_classes)),
        "value": to_half(torch.from_numpy(log_p_PK - most_P[:, None])).numpy(),
        "tail": (left_P - most_P).astype(np.float32)[:, None],
    }


def _read_entry(entry: Mapping[Any, Any] | None, token: int, place: int, kept: int) -> tuple[list[int], list[float]]:
    """The `kept` most probable ids at a place and their log-probabilities, the largest first."""
    if not entry:
        raise DataError(
            f"prompt_logprobs: token {place}: expected log-probabilities, found none; record with "
            "enable_prefix_caching=False, since tokens in the cache have none"
        )
    found = {int(number): (_read_field(one, "rank"), _read_field(one, "logprob")) for number, one in entry.items()}
    if token not in found:
        raise DataError(
            f"prompt_logprobs: token {place}: expected an entry of the token itself, {token}, found "
            f"{', '.join(map(str, list(found)[:3]))}, ...: they belong to other tokens or to another position"
        )
    # Ranks begin at 1; the token itself has a larger one where it is not among the most probable.
    ranked = sorted((rank, number) for number, (rank, _) in found.items() if rank is not None and rank <= kept)
    if [rank for rank, _ in ranked] != list(range(1, kept + 1)):
        raise DataError(
            f"prompt_logprobs: token {place}: expected the ranks 1 to {kept}, found {len(ranked)} of them; record with "
            f"prompt_logprobs={kept} or more, or keep fewer"
        )
    ids = [number for _, number in ranked]
    log_probs = [float(found[number][1]) for number in ids]
    if any(math.isnan(one) for one in log_probs) or log_probs[0] == -math.inf:
        raise DataError(f"prompt_logprobs: token {place}: expected numbers, found {log_probs[:3]}")
    return ids, log_probs


def _read_field(one: Any, name: str) -> Any:
    return one.get(name) if isinstance(one, Mapping) else getattr(one, name, None)
