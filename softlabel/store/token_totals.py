"""How many tokens and labelled positions a store has, from the counts in its shards."""

from dataclasses import dataclass

import numpy as np

from softlabel.store.reader import Store

_SHARDS, _REMOTE_SHARDS = 1000, 1  # opened; a remote shard is fetched whole


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTotals:
    """Tokens and labelled positions of a store; with `exact` False scaled up from some of its shards."""

    tokens: int
    positions: int
    exact: bool


def count_tokens(store: Store) -> TokenTotals:
    """Count the tokens of a store of tokens, of a large or remote one from shards at equal distances.

    Raises:
        StoreCorruptError: a shard is missing or damaged.
    """
    filled = [record for record in store.shards if record.rows]
    limit = _REMOTE_SHARDS if "://" in store.url else _SHARDS
    starts = np.cumsum([0, *(record.rows for record in filled)])
    picked = np.unique(np.linspace(0, len(filled) - 1, min(limit, len(filled))).astype(np.int64))
    rows = tokens = positions = 0
    for start in starts[picked].tolist():
        for _, shard in store.open_shards(start, start + 1):
            rows += shard.spans.rows
            tokens += shard.spans.total("token")
            positions += shard.spans.total("position")
    scale = len(store) / max(1, rows)
    return TokenTotals(tokens=round(tokens * scale), positions=round(positions * scale), exact=rows == len(store))
