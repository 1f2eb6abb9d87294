"""Exports of token stores for other trainers: read back without softlabel, with the trainers' own arithmetic.

L tokens of a document, P labelled positions, K kept tokens, V tokens of the vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

import softlabel
from softlabel.convert import convert_store, export_store
from softlabel.errors import MismatchError
from softlabel.loss import TopKTarget, distillation_loss
from softlabel.store.encodings import Encoding, Float32, Sampled, TopK
from softlabel.store.manifest import Combine, Member
from tests.support.commands import run_softlabel
from tests.support.documents import Documents, make_token_run
from tests.support.language_models import CHATML, find_stories, write_language_model
from tests.support.language_runs import write_documents
from tests.support.llama_reference import compute_logits, read_llama
from tests.support.stores import Samples, make_run, read_files, write_store

F64 = NDArray[np.float64]

DOCUMENTS, K = 10, 16
# Of axolotl's chat_template strategy: the contents one after another.
PASS_ON = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CHATS = [
    [{"role": "user", "content": "Who sat?"}, {"role": "assistant", "content": "a cat, an ünï cat"}],
    [
        {"role": "user", "content": "cats?"},
        {"role": "assistant", "content": "cats"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "a mat"},
    ],
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module", params=[("random", 1.0), ("random", 2.0), ("stories", 2.0)])
def stories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with documents beside it, and a store of its top-k labels whose own temperature is 1 or 2: random weights
    and a tokenizer of bytes, or a trained model, whose tokenizer is one of words."""
    (kind, temperature), out = request.param, tmp_path_factory.mktemp("stories") / "labels"
    if kind == "stories":
        folder = find_stories()
    else:
        folder = write_language_model(out.with_name("lm"), "llama", max_position_embeddings=320)
        write_documents(folder / "test.jsonl", count=DOCUMENTS + 2, words=60)
    softlabel.generate(
        f"{folder}/test.jsonl?rows=0:{DOCUMENTS}&key=id",
        teachers=[f"lm:{folder}"],
        out=out,
        encoding=TopK(k=K, temperatures=(1.0, 2.0)),
        temperature=temperature,
        max_length=320,
        shard_positions=500,
        preflight=False,
    )
    return folder, out


def log_softmax(logits: F64) -> F64:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def divide(log_p: F64, log_q: F64) -> F64:
    """KL over the last axis."""
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def tokenize(folder: Path) -> tuple[list[str], list[list[int]], int]:
    """The keys, the ids, and the size of the vocabulary."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()[:DOCUMENTS]]
    ids = [tokenizer.encode(line["text"]).ids[:320] for line in lines]
    return [line["id"] for line in lines], ids, tokenizer.get_vocab_size()


def compute_soft_loss(store: Path, logits_PV: F64, tail: str, used: NDArray[np.bool_] | None = None) -> float:
    """softlabel's own loss at T = 1, of all positions or of some."""
    with softlabel.open_store(store) as opened:
        rows, run = opened.take(range(len(opened))), opened.run
    target = TopKTarget(
        index=torch.from_numpy(rows.columns["index"].astype(np.int64)),
        value=torch.from_numpy(rows.columns["value"].copy()),
        tail=torch.from_numpy(rows.columns["tail"].copy()),
        tail_temperatures=(1.0, 2.0),
        temperature=run.temperature,
        num_classes=run.num_classes,
    )
    student = torch.from_numpy(logits_PV)
    if used is not None:
        target, student = target.take(torch.from_numpy(np.flatnonzero(used))), student[torch.from_numpy(used)]
    return float(distillation_loss(student, target, temperature=1.0, soft_weight=1, hard_weight=0, tail=tail))


def test_distillkit_reads_what_its_sparse_divergence_needs(stories: tuple[Path, Path], tmp_path: Path) -> None:
    folder, store = stories
    printed = run_softlabel("export", store, tmp_path / "out", "--to", "distillkit").stdout
    assert f"{DOCUMENTS} rows" in printed
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert len(files) > 2
    table = pa.concat_tables([pq.read_table(path) for path in files])
    assert table.schema.remove_metadata() == pa.schema(
        {
            "input_ids": pa.list_(pa.uint64()),
            "token_ids": pa.list_(pa.list_(pa.int32())),
            "top_values": pa.list_(pa.list_(pa.float32())),
        }
    )
    rows, (_, ids, tokens) = table.to_pydict(), tokenize(folder)
    assert rows["input_ids"] == ids
    assert [len(one) for one in rows["token_ids"]] == [len(one) for one in rows["top_values"]] == [*map(len, ids)]
    index_PK = np.concatenate([np.array(one) for one in rows["token_ids"]])
    log_p_PK = np.concatenate([np.array(one) for one in rows["top_values"]])

    # sparse_kl_div with missing probability "symmetric_uniform": the tokens that are left out are one more outcome.
    student_PV = np.random.default_rng(0).normal(0, 2, (len(index_PK), tokens))
    log_q_PK = np.take_along_axis(log_softmax(student_PV), index_PK, axis=1)
    kept_p_P, kept_q_P = (np.minimum(np.exp(one).sum(axis=1), 1 - 1e-6) for one in (log_p_PK, log_q_PK))
    missing_P = (1 - kept_p_P) * np.log((1 - kept_p_P) / (1 - kept_q_P))
    theirs = float((divide(log_p_PK, log_q_PK) + np.where(1 - kept_p_P > 1e-6, missing_P, 0)).mean())
    assert theirs == pytest.approx(compute_soft_loss(store, student_PV, "ghost"), abs=1e-4)

    model = read_llama(folder)
    exact_PV = np.concatenate([log_softmax(compute_logits(model, one)) for one in ids])
    log_r_PK = np.take_along_axis(exact_PV, index_PK, axis=1)
    np.testing.assert_array_equal(np.sort(index_PK), np.sort(np.argsort(-exact_PV, kind="stable")[:, :K]))
    np.testing.assert_allclose(log_p_PK, log_r_PK, atol=0.01)  # a float16 of up to 16
    kept_r_P = np.exp(log_r_PK).sum(axis=1)
    reference = divide(log_r_PK, log_q_PK) + (1 - kept_r_P) * np.log((1 - kept_r_P) / (1 - kept_q_P))
    assert theirs == pytest.approx(float(reference.mean()), abs=1e-4)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((folder / "data").iterdir()) for line in path.open()]


def retokenize(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    """The ids that transformers makes of messages, as axolotl asks it to."""
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    found = peer.apply_chat_template(messages, chat_template=PASS_ON, tokenize=True, return_dict=False)
    return list(found)


def test_axolotl_aligns_its_rows_from_the_right(stories: tuple[Path, Path], tmp_path: Path) -> None:
    folder, store = stories
    assert "left out" not in run_softlabel("export", store, tmp_path / "out", "--to", "axolotl").stdout
    lines, (keys, ids, tokens) = read_lines(tmp_path / "out"), tokenize(folder)
    assert [line["id"] for line in lines] == keys
    assert all(set(line) == {"id", "messages", "logprobs", "target_token_ids"} for line in lines)
    model, rng = read_llama(folder), np.random.default_rng(0)
    theirs, reference, students, used = [], [], [], []
    for line, of in zip(lines, ids, strict=True):
        assert retokenize(folder, line["messages"]) == of
        assert [one["role"] for one in line["messages"]] == ["assistant"]
        # Row r is about the token len(ids) - len(rows) + r, which the student says at the position before it.
        pad = len(of) - len(line["logprobs"])
        student_LV = rng.normal(0, 2, (len(of), tokens))
        log_q_PV = log_softmax(student_LV)[pad - 1 : -1]
        index_PK = np.array(line["target_token_ids"])
        log_p_PK = log_softmax(np.array(line["logprobs"]))  # renormalised, kd_normalize_topk false
        log_q_PK = np.take_along_axis(log_q_PV, index_PK, axis=1)
        theirs.append(divide(log_p_PK, log_q_PK))
        exact_LV = compute_logits(model, of)
        log_r_PK = log_softmax(np.take_along_axis(exact_LV[: len(of) - 1], index_PK, axis=1))
        reference.append(divide(log_r_PK, log_q_PK))
        students.append(student_LV)
        used.append(np.arange(len(of)) < len(of) - 1)
    mean = float(np.concatenate(theirs).mean())
    ours = compute_soft_loss(store, np.concatenate(students), "renormalize", np.concatenate(used))
    assert mean == pytest.approx(ours, abs=1e-4)
    assert mean == pytest.approx(float(np.concatenate(reference).mean()), abs=1e-4)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_axolotl_learns_what_the_assistant_says(positions: str, tmp_path: Path) -> None:
    teacher = write_language_model(tmp_path / "lm", "llama", template=CHATML, max_position_embeddings=200)
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"id": f"c{n}", "messages": chat}) + "\n" for n, chat in enumerate(CHATS)))
    softlabel.generate(
        f"{data}?messages=messages&key=id",
        teachers=[f"lm:{teacher}"],
        out=tmp_path / "labels",
        encoding=TopK(k=4),
        temperature=1.0,
        max_length=200,
        positions=positions,
        preflight=False,
    )
    export_store(tmp_path / "labels", tmp_path / "out", to="axolotl")
    with softlabel.open_store(tmp_path / "labels") as store:
        rows = store.take(range(2))
    edges = np.cumsum([0, *rows.lengths])
    for number, line in enumerate(read_lines(tmp_path / "out")):
        here = slice(*edges[number : number + 2])
        ids, mask = rows.columns["tokens"][here, 0], rows.columns["mask"][here, 0]
        assert retokenize(teacher, line["messages"]) == ids.tolist()
        said = "".join(one["content"] for one in line["messages"] if one["role"] == "assistant")
        for message in CHATS[number]:
            assert (message["content"] in said) == (message["role"] == "assistant")
        counts = [len(one) for one in line["logprobs"]]
        assert counts == [len(one) for one in line["target_token_ids"]]
        assert counts == [4 if count or positions == "all" else 0 for count in mask[:-1]]
    with pytest.raises(MismatchError, match=r"--to distillkit: expected that every position counts.*'c0'.*axolotl"):
        export_store(tmp_path / "labels", tmp_path / "other", to="distillkit")


def test_documents_of_other_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    teacher = write_language_model(tmp_path / "lm", "llama")
    vocab = tokenizers.Tokenizer.from_file(str(teacher / "tokenizer.json"))
    cat, apart = vocab.encode("a cat").ids, [*vocab.encode("a ").ids, *(vocab.token_to_id(one) for one in "cat")]
    ids = [cat, apart, cat[:1], [*cat, *apart[1:]], cat]
    pq.write_table(pa.table({"ids": ids}), tmp_path / "ids.parquet")
    softlabel.generate(
        f"{tmp_path}/ids.parquet?tokens=ids",
        teachers=[f"lm:{teacher}"],
        out=tmp_path / "labels",
        encoding=TopK(k=4),
        temperature=1.0,
        max_length=32,
        shard_rows=2,
        preflight=False,
    )
    out = tmp_path / "out"
    done = export_store(tmp_path / "labels", out, to="axolotl")
    assert (done.total_rows, done.left_out, done.files_written) == (5, 3, 3)
    assert [line["id"] for line in read_lines(out)] == ["0", "4"]
    before = read_files(out)
    # As after a kill between the second file and the third one.
    (out / "data" / "train-00002-of-00003.jsonl").unlink()
    printed = run_softlabel("export", tmp_path / "labels", out, "--to", "axolotl").stdout
    assert "3 of them left out: their text has other tokens" in printed
    after = read_files(out)
    assert {name: after[name] for name in after if "data" in name} == {n: before[n] for n in before if "data" in n}
    with pytest.raises(MismatchError, match=r"expected an export of store .* --to distillkit, found another"):
        export_store(tmp_path / "labels", out, to="distillkit")


def test_a_masked_token_stays_a_number(tmp_path: Path) -> None:
    run = make_token_run("parquet", samples=6, classes=30, encoding=Float32(), temperature=1.0)
    documents = Documents.of(run)
    answers = [[one.copy() for one in view] for view in documents.logits]
    for one in answers[0]:
        one[:, 3:] = -np.inf
        one -= one.max(axis=1, keepdims=True)
    masks = [np.ones_like(one) for one in documents.masks]
    changes = {"columns": {"logits": answers}, "masks": masks}
    write_store(tmp_path / "dense", run, Documents(**{**fields_of(documents), **changes}))
    convert_store(tmp_path / "dense", tmp_path / "top", encoding=TopK(k=5))
    export_store(tmp_path / "top", tmp_path / "out", to="distillkit")
    table = pq.read_table(tmp_path / "out" / "data").to_pydict()
    values_PK = np.concatenate([np.array(one) for one in table["top_values"]])
    assert np.array_equal(values_PK[:, 3:], np.full((len(values_PK), 2), np.float32(-1e9)))
    np.testing.assert_allclose(np.exp(values_PK).sum(axis=1), 1, atol=1e-6)


def write_unsuited(root: Path, what: str) -> Path:
    """A store that has no log-probabilities of tokens at temperature 1."""
    if what == "images":
        run = make_run("hdf5")
        write_store(root, run, Samples.of(run))
        return root
    changes: dict[str, Any] = {"encoding": Float32(), "temperature": 1.0 if what != "temperature" else 2.0}
    if what == "members":
        members = tuple(Member(spec=f"lm:{name}", sha256=name * 64, num_classes=30) for name in "ab")
        changes |= {"members": members, "combine": Combine(rule="keep", weights=(0.5, 0.5)), "classes": 15}
        changes["members"] = tuple(Member(spec=one.spec, sha256=one.sha256, num_classes=15) for one in members)
    run = make_token_run("hdf5", samples=6, **{"classes": 30, **changes})
    documents = Documents.of(run)
    width = run.num_classes * run.members_stored
    answers = [[np.resize(one, (len(one), width)) for one in view] for view in documents.logits]
    write_store(root, run, Documents(**{**fields_of(documents), "columns": {"logits": answers}}))
    encodings: dict[str, Encoding] = {
        "sampled": Sampled(samples=4),
        "temperature": TopK(k=4, temperatures=(2.0,)),
        "tokenizer": TopK(k=4),
    }
    if what not in encodings:
        return root
    convert_store(root, root.with_name("other"), encoding=encodings[what])
    return root.with_name("other")


def fields_of(documents: Documents) -> dict[str, Any]:
    return {name: getattr(documents, name) for name in ("run", "keys", "ids", "masks", "content", "logits")}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("images", "expected a store of tokens, found one of image; export with --to hf or npz"),
        ("sampled", "expected encoding topk, found sampled; generate with --encoding topk"),
        ("float32", "expected encoding topk, found float32; 'softlabel convert .* makes one of it"),
        ("members", "found those of 2 members; 'softlabel combine'"),
        ("temperature", "expected a tail at temperature 1, found 2: .*--temperatures 1"),
        ("tokenizer", "expected the teacher's tokenizer.json in the store, found none"),
    ],
)
def test_what_has_no_meaning_is_refused(what: str, message: str, tmp_path: Path) -> None:
    store = write_unsuited(tmp_path / "store", what)
    for to in ("distillkit", "axolotl")[what == "tokenizer" :]:
        with pytest.raises(MismatchError, match=message):
            export_store(store, tmp_path / "out", to=to)
    failed = run_softlabel("export", store, tmp_path / "out", "--to", "axolotl", code=2)
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
