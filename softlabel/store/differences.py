"""Differences between two runs, in words."""

from collections.abc import Iterable
from typing import Any

_FIELD_NAMES = {
    "dataset.rows": "dataset size",
    "dataset.fingerprint": "dataset keys (fingerprint)",
    "combine.rule": "combine rule",
    "combine.weights": "combine weights",
    "compression": "compression of keys and views",
    "features": "features (--also)",
    "features.embedding": "embedding (--also embedding)",
    "features.attention": "maps of attention (--also attention)",
    "features.embedding.projection": "seed of the embedding's projection (--embedding-width)",
    "features.embedding.taps": "where embeddings are taken (?embedding= of a teacher)",
    "features.embedding.type": "type of embeddings (--embedding-type)",
    "features.embedding.width": "width of embeddings (--embedding-width)",
    "encoding.draw": "draws (--draw)",
    "input": "kind of samples",
    "views.count": "number of views",
    "views.seed": "view seed",
    "num_classes": "number of classes",
    "tokens.tokenizer": "tokenizer (sha256 of its vocabulary)",
    "tokens.template": "chat template (sha256)",
    "tokens.max_length": "longest document (--max-length)",
    "tokens.positions": "labelled positions (--positions)",
    "shard_rows": "rows per shard (--shard-rows)",
}
_DEFAULTS = {  # left out of a manifest
    "activation": "softmax",
    "compression": "none",
    "encoding.draw": "independent",
    "input": "image",
    "tokens.positions": "all",
}


# What a teacher takes follows from the longest document.
_OF_LENGTH = ("max_length", "buckets")


def find_differences(store: Any, run: Any) -> list[str]:
    """Return the differences between a store's run and this run, both as JSON objects."""
    lengths = [(one.get("tokens") or {}).get("max_length") for one in (store, run)]
    if lengths[0] != lengths[1]:
        store, run = _leave_lengths_out(store), _leave_lengths_out(run)
    if store["format"] != run["format"]:  # which says what is compressed, too
        store, run = ({**one, "compression": None} for one in (store, run))
    return list(_iter_differences("", store, run))


def _leave_lengths_out(run: Any) -> Any:
    """The run with teachers that say nothing of the length of documents."""
    members = [
        {**one, "preprocessing": {k: v for k, v in one["preprocessing"].items() if k not in _OF_LENGTH}}
        for one in run["members"]
    ]
    return {**run, "members": members}


def _iter_differences(path: str, store: Any, run: Any) -> Iterable[str]:
    """Yield the differences between two JSON values at `path`."""
    if path == "views.policy" and store != run:
        yield f"view policy: the store has {_format_policy(store)}, this run {_format_policy(run)}"
    elif path == "encoding" and store["name"] != run["name"]:  # one has parameters that the other lacks
        yield f"{path}: the store has {store['name']}, this run {run['name']}"
    elif path in ("features", "features.embedding", "features.attention") and (store is None) != (run is None):
        sides = ("none" if one is None else ", ".join(one) if path == "features" else "some" for one in (store, run))
        yield "{}: the store has {}, this run {}".format(_FIELD_NAMES[path], *sides)
    elif isinstance(store, dict) and isinstance(run, dict):
        for name in sorted(store.keys() | run.keys()):
            yield from _iter_differences(f"{path}.{name}" if path else name, store.get(name), run.get(name))
    elif path == "members" and len(store) == len(run):
        for position, (one, other) in enumerate(zip(store, run, strict=True), 1):
            yield from _iter_differences(f"teacher {position}", one, other)
    elif store != run:
        usual = _DEFAULTS.get(path)
        store, run = store or usual, run or usual
        if path == "members":
            store, run = ([member["spec"] for member in side] for side in (store, run))
            path = "teachers"
        yield f"{_FIELD_NAMES.get(path, path)}: the store has {_shorten(store)}, this run {_shorten(run)}"


def _format_policy(policy: Any) -> str:
    return _shorten(policy.get("steps") or policy.get("name"))


def _shorten(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
