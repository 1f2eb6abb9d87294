"""Log-probabilities in the shape in which vLLM records those of a prompt, made from a real model's forward pass.

L tokens of a document, P positions, K kept tokens, V tokens of the vocabulary.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import xxhash

import softlabel
from softlabel.convert import export_store
from softlabel.errors import DataError
from softlabel.labels.encodings import encode
from softlabel.labels.prompt_logprobs import convert_prompt_logprobs
from softlabel.store.encodings import TopK
from softlabel.store.verify import verify_store
from tests.support.documents import Documents, make_token_run
from tests.support.language_models import find_stories
from tests.support.llama_reference import compute_logits, describe, read_llama
from tests.support.stores import write_store

K, V = 8, 512
Entry = dict[str, dict[str, Any]] | None


@dataclasses.dataclass
class Logprob:
    """As in vllm.logprobs."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def record(logits_LV: np.ndarray, ids: list[int]) -> list[Entry]:
    """What vLLM's server answers of a prompt: the K largest of each token's distribution, and the token itself."""
    log_p_LV = (logits_LV - np.logaddexp.reduce(logits_LV, axis=1, keepdims=True)).astype(np.float32)
    found: list[Entry] = [None]
    for log_p_V, token in zip(log_p_LV[:-1], ids[1:], strict=True):
        largest = np.argsort(-log_p_V, kind="stable")[:K].tolist()
        # The token comes first, and again as one of the largest where it is one.
        ranks = {token: int((log_p_V >= log_p_V[token]).sum()), **{one: at + 1 for at, one in enumerate(largest)}}
        found.append(
            {
                str(one): {"logprob": float(log_p_V[one]), "rank": rank, "decoded_token": f"<{one}>"}
                for one, rank in ranks.items()
            }
        )
    return found


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], list[np.ndarray], Path]:
    """Documents, their exact logits, and a file of JSON lines of what was recorded of them."""
    folder = find_stories()
    tokenizer, model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), read_llama(folder)
    texts = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()[:6]]
    ids = [tokenizer.encode(text).ids[:60] for text in [*texts, "A"]]
    logits = [compute_logits(model, one) for one in ids]
    path = tmp_path_factory.mktemp("vllm") / "recorded.jsonl"
    lines = [{"prompt_token_ids": one, "prompt_logprobs": record(of, one)} for one, of in zip(ids, logits, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ids, logits, path


def read_recorded(path: Path) -> list[tuple[list[int], list[Entry]]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(one["prompt_token_ids"], one["prompt_logprobs"]) for one in lines]


def as_objects(entries: list[Entry]) -> list[dict[int, Logprob] | None]:
    """As `LLM.generate` returns them."""
    return [None if one is None else {int(token): Logprob(**of) for token, of in one.items()} for one in entries]


@pytest.mark.parametrize("shape", ["json", "objects"])
def test_rows_are_those_of_the_forward_pass(
    shape: str, recordings: tuple[list[list[int]], list[np.ndarray], Path]
) -> None:
    _, logits, path = recordings
    numbers_of_entries = set()
    for (ids, entries), logits_LV in zip(read_recorded(path), logits, strict=True):
        numbers_of_entries |= {len(one) for one in entries if one is not None}
        given: Any = entries if shape == "json" else as_objects(entries)
        found = convert_prompt_logprobs(given, ids, k=K, num_classes=V)
        expected = describe(logits_LV[:-1], k=K)
        np.testing.assert_array_equal(found["index"], expected.index)
        np.testing.assert_allclose(found["value"], expected.value, atol=0.01)
        np.testing.assert_allclose(found["tail"][:, 0], expected.tail, atol=1e-3)
        # And those that the encoding makes of the same logits.
        scaled_PV = torch.from_numpy((logits_LV - logits_LV.max(axis=1, keepdims=True))[:-1].astype(np.float32))
        ours = encode(scaled_PV, TopK(k=K, temperatures=(1.0,)), temperature=1.0)
        assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
            name: (one.numpy().dtype, tuple(one.shape)) for name, one in ours.items()
        }
        np.testing.assert_allclose(found["tail"], ours["tail"].numpy(), atol=1e-3)
    assert numbers_of_entries == {K, K + 1}


def test_fewer_may_be_kept_than_were_recorded(recordings: tuple[list[list[int]], list[np.ndarray], Path]) -> None:
    _, logits, path = recordings
    ids, entries = read_recorded(path)[0]
    found = convert_prompt_logprobs(entries, ids, k=3, num_classes=V)
    expected = describe(logits[0][:-1], k=3)
    np.testing.assert_array_equal(found["index"], expected.index)
    np.testing.assert_allclose(found["tail"][:, 0], expected.tail, atol=1e-3)


def test_a_store_holds_them_without_the_last_position(
    recordings: tuple[list[list[int]], list[np.ndarray], Path], tmp_path: Path
) -> None:
    ids, _, path = recordings
    found = [convert_prompt_logprobs(entries, one, k=K, num_classes=V) for one, entries in read_recorded(path)]
    encoding = TopK(k=K, temperatures=(1.0,))
    run = make_token_run("hdf5", samples=len(ids), classes=V, encoding=encoding, temperature=1.0)
    assert run.tokens is not None
    run = dataclasses.replace(run, tokens=dataclasses.replace(run.tokens, max_length=60))
    arrays = [np.array(one, "<i4") for one in ids]
    documents = dataclasses.replace(
        Documents.of(run),
        ids=arrays,
        masks=[np.ones(len(one), "u1") for one in ids],
        content=np.array([xxhash.xxh3_64_intdigest(one.tobytes()) for one in arrays], np.uint64),
        columns={name: [[one[name] for one in found]] for name in found[0]},
    )
    write_store(tmp_path / "labels", run, documents)
    assert verify_store(tmp_path / "labels").ok
    with softlabel.open_store(tmp_path / "labels") as store:
        rows = store.take(range(len(ids)))
    assert rows.positions.tolist() == [len(one) - 1 for one in ids]
    # And other trainers get no token without an answer.
    export_store(tmp_path / "labels", tmp_path / "out", to="distillkit")
    table = pq.read_table(tmp_path / "out" / "data").to_pydict()
    assert table["input_ids"] == [one[:-1] for one in ids]
    for values, columns, (_, entries) in zip(table["top_values"], found, read_recorded(path), strict=True):
        largest = [max(of["logprob"] for of in entry.values()) for entry in entries[1:] if entry is not None]
        np.testing.assert_allclose(np.array(values)[:, 0], largest, atol=2e-3)
        np.testing.assert_allclose(np.diff(values), np.diff(columns["value"].astype(np.float64)), atol=1e-5)


def shift(ids: list[int], entries: list[Any]) -> tuple[list[int], list[Any]]:
    return ids, [None, *entries[2:], entries[1]]


def to_logits(ids: list[int], entries: list[Any]) -> tuple[list[int], list[Any]]:
    return ids, [
        None if one is None else {token: {**of, "logprob": of["logprob"] + 9} for token, of in one.items()}
        for one in entries
    ]


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        (lambda ids, entries: (ids, entries[1:]), K, "one entry for each of 60 tokens, found 59"),
        (lambda ids, entries: (ids[1:], entries[1:]), K, "expected None for the first token"),
        (lambda ids, entries: (ids, [*[None] * 16, *entries[16:]]), K, "token 1: .*enable_prefix_caching=False"),
        (shift, K, r"token \d+: expected an entry of the token itself.*another position"),
        (to_logits, K, r"token 1: .*sum up to at most 1, found .*raw_logprobs"),
        (lambda ids, entries: (ids, entries), K + 4, "token 1: expected the ranks 1 to 12, found .*prompt_logprobs=12"),
    ],
)
def test_what_was_recorded_in_another_way_is_refused(
    change: Callable[..., tuple[list[int], list[Any]]],
    k: int,
    message: str,
    recordings: tuple[list[list[int]], list[np.ndarray], Path],
) -> None:
    ids, entries = change(*read_recorded(recordings[2])[0])
    with pytest.raises(DataError, match=message):
        convert_prompt_logprobs(entries, ids, k=k, num_classes=V)
