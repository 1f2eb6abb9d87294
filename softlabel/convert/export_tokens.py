"""Export a store of tokens for the trainers of language models that read top-k log-probabilities from a data set.

P labelled positions of documents, L tokens of a document, K kept tokens of the vocabulary.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.convert.export_folder import Written, write_folder
from softlabel.convert.export_parquet import make_lists, wrap_lists
from softlabel.convert.plain_columns import describe
from softlabel.errors import MismatchError
from softlabel.inputs.tokenizer import Tokenizer
from softlabel.store.columns import Array
from softlabel.store.encodings import TopK
from softlabel.store.encodings.base import find_temperature
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows
from softlabel.store.token_rows import LENGTH, MASK, POSITIONS, TOKENS

Update = Callable[[int], object]

# Of a token that the teacher masks: -inf times a probability of 0 would be NaN, and JSON has no infinity.
_LOWEST = -1e9
_LABELS = ("index", "value", "tail")


def write_distillkit(store: Store, out: Path, progress: bool | None, options: Mapping[str, Any] | None) -> Written:
    """Write Parquet files for DistillKit. For arguments and errors see `export_store`."""
    temperature = _check_labels(store, "distillkit")
    _refuse_masks(store)
    about = {**describe(store), "to": "distillkit"}
    fields = [
        ("input_ids", pa.list_(pa.uint64())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("top_values", pa.list_(pa.list_(pa.float32()))),
    ]
    schema = pa.schema(fields).with_metadata({"softlabel": json.dumps(about)})

    def write(path: Path, start: int, stop: int, update: Update) -> int:
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
            for rows in store.stream([*_LABELS, TOKENS, LENGTH, POSITIONS], start=start, stop=stop):
                index_PK, log_prob_PK = _compute_log_probs(rows, temperature)
                offsets = rows.spans.offsets["position"]
                starts_P = np.repeat(rows.spans.offsets["token"][:-1], rows.positions)
                labelled = rows.columns[TOKENS].reshape(-1)[starts_P + rows.places]
                columns = [
                    wrap_lists(offsets, pa.array(labelled.astype(np.uint64))),
                    wrap_lists(offsets, make_lists(index_PK.astype(np.int32))),
                    wrap_lists(offsets, make_lists(log_prob_PK.astype(np.float32))),
                ]
                writer.write_table(pa.table(columns, schema=schema))
                update(len(rows))
        return 0

    return write_folder(store, out, write, suffix="parquet", about=about, progress=progress, options=options)


def write_axolotl(store: Store, out: Path, progress: bool | None, options: Mapping[str, Any] | None) -> Written:
    """Write JSON lines for axolotl. For arguments and errors see `export_store`."""
    temperature = _check_labels(store, "axolotl")
    content = store.tokenizer
    if content is None:
        raise MismatchError(
            f"{store.url}: expected the teacher's tokenizer.json in the store, found none: axolotl tokenises texts, "
            "and there are none without it; generate the store with an lm: teacher"
        )
    write_text = _TextWriter(Tokenizer(content), store)

    def write(path: Path, start: int, stop: int, update: Update) -> int:
        left_out = 0
        with path.open("w", encoding="utf-8") as file:
            for rows in store.stream(["key", *_LABELS, TOKENS, MASK, LENGTH, POSITIONS], start=start, stop=stop):
                for line in _iter_lines(rows, temperature, write_text):
                    if line is None:
                        left_out += 1
                    else:
                        file.write(line)
                update(len(rows))
        return left_out

    about = {**describe(store), "to": "axolotl"}
    return write_folder(store, out, write, suffix="jsonl", about=about, progress=progress, options=options)


def _check_labels(store: Store, to: str) -> int:
    """Return which of the store's tails is that of temperature 1.

    Raises:
        MismatchError: there are no top-k log-probabilities of tokens at temperature 1.
    """
    run, encoding = store.run, store.run.encoding
    if run.tokens is None:
        raise MismatchError(
            f"{store.url}: --to {to}: expected a store of tokens, found one of {run.input}; export with --to hf or npz"
        )
    if run.kept:
        raise MismatchError(
            f"{store.url}: --to {to}: expected one answer for each position, found those of {run.members_stored} "
            "members; 'softlabel combine' makes one of them"
        )
    if not isinstance(encoding, TopK):
        remedy = (
            "generate with --encoding topk"
            if encoding.drawn
            else "'softlabel convert STORE OUT --encoding topk --top-k 32 --temperatures 1' makes one of it"
        )
        raise MismatchError(f"{store.url}: --to {to}: expected encoding topk, found {encoding.name}; {remedy}")
    place = find_temperature(encoding.temperatures, 1.0)
    if place is None:
        listed = ", ".join(f"{one:g}" for one in encoding.temperatures)
        raise MismatchError(
            f"{store.url}: --to {to}: expected a tail at temperature 1, found {listed}: log-probabilities at 1 are not "
            "known; generate with --temperatures 1"
        )
    return place


def _refuse_masks(store: Store) -> None:
    """Raises MismatchError where a position does not count: DistillKit has no place to say so."""
    for rows in store.stream(["key", MASK]):
        offsets = rows.spans.offsets["token"]
        if (zeros := np.flatnonzero(rows.columns[MASK].reshape(-1) == 0)).size:
            key = rows.keys[int(np.searchsorted(offsets, zeros[0], side="right")) - 1]
            raise MismatchError(
                f"{store.url}: --to distillkit: expected that every position counts, found that some of document "
                f"{key!r} do not: DistillKit applies one mask to soft labels and, one position later, to hard ones; "
                "export with --to axolotl"
            )


def _compute_log_probs(rows: StoredRows, place: int) -> tuple[Array, Array]:
    """Return the ids (P, K) and their log-probabilities at temperature 1, float64 (P, K), from a tail."""
    value_PK = rows.columns["value"].astype(np.float64) * rows.run.temperature
    tail_P = rows.columns["tail"][:, place].astype(np.float64)
    kept_P = np.log(np.exp(value_PK).sum(axis=1))  # the largest value is 0
    return rows.columns["index"], np.maximum(value_PK - np.logaddexp(kept_P, tail_P)[:, None], _LOWEST)


def _iter_lines(rows: StoredRows, place: int, write_text: "_TextWriter") -> Iterator[str | None]:
    """Yield a line of JSON for each document, None for one that is left out."""
    index_PK, log_prob_PK = _compute_log_probs(rows, place)
    spans, places_P = rows.spans, rows.places
    tokens, masks = rows.columns[TOKENS].reshape(-1), rows.columns[MASK].reshape(-1)
    for number, key in enumerate(rows.keys):
        of_tokens = slice(*spans.cut("token", number, number + 1))
        first, stop = spans.cut("position", number, number + 1)
        ids, mask = tokens[of_tokens].tolist(), masks[of_tokens]
        # What comes after the last token has no place; one entry for every other position, empty without a label.
        places = places_P[first:stop]
        places = places[places < len(ids) - 1]
        messages = write_text(ids, mask) if mask[places].any() else None
        if messages is None:
            yield None
            continue
        here = slice(first, first + len(places))
        logprobs: list[list[float]] = [[] for _ in ids[1:]]
        token_ids: list[list[int]] = [[] for _ in ids[1:]]
        for at, values, kept in zip(places, log_prob_PK[here].round(6).tolist(), index_PK[here].tolist(), strict=True):
            logprobs[at], token_ids[at] = values, kept
        line = {"id": key, "messages": messages, "logprobs": logprobs, "target_token_ids": token_ids}
        yield json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"


class _TextWriter:
    """Writes tokens as messages, whose contents one after another have these very tokens again.

    A message of the assistant has what is to be learnt, one of the user what is not.
    """

    def __init__(self, tokenizer: Tokenizer, store: Store) -> None:
        self._loaded, tokens = tokenizer.load(), store.run.tokens
        assert tokens is not None
        added = self._loaded.get_added_tokens_decoder()
        self._special = {number for number, one in added.items() if one.special} | {tokens.bos, tokens.eos}

    def __call__(self, ids: list[int], mask_L: Array) -> list[dict[str, str]] | None:
        """Return the messages; None where the tokenizer gives other tokens for this text."""
        # Of chats and token ids the ends are those of the template: any special token.
        first = 1 if ids[0] in self._special else 0
        last = len(ids) - 1 if ids[-1] in self._special and len(ids) > first else len(ids)
        # The ends apart: some decoders write a space after them, or drop one at the beginning of a text.
        ends = [self._loaded.id_to_token(one) for one in (*ids[:first], *ids[last:])]
        text = self._loaded.decode(ids[first:last], skip_special_tokens=False)
        text = "".join([*ends[:first], text, *ends[first:]])
        encoded = self._loaded.encode(text, add_special_tokens=False)
        if encoded.ids != ids:
            return None
        learnt = np.concatenate([mask_L[:1], mask_L[:-1]])  # token t is learnt at position t - 1
        turns = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist()]
        edges = [*(encoded.offsets[turn][0] for turn in turns), len(text)]
        edges[0] = 0
        return [
            {"role": "assistant" if learnt[turn] else "user", "content": text[edges[at] : edges[at + 1]]}
            for at, turn in enumerate(turns)
        ]
