"""Labels of every position of documents: what a plain forward pass says, and nothing that depends on the batch.

L positions of a document, P positions of several, K kept classes, C tokens of the vocabulary.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
import xxhash
from safetensors.torch import load_file

import softlabel
from softlabel.convert.merge import merge_stores
from softlabel.convert.recode import convert_store
from softlabel.errors import DataError, MismatchError, SpecError, TeacherError, UsageError
from softlabel.loader.target import make_target
from softlabel.loss import distillation_loss, linear_distillation_loss
from softlabel.maintain.extend import extend
from softlabel.store.encodings import Head, Sampled, TopK
from softlabel.store.verify import verify_store
from tests.support.commands import run_softlabel
from tests.support.language_models import find_stories, write_bigrams, write_language_model
from tests.support.language_runs import write_documents
from tests.support.llama_reference import compute_logits, describe, read_llama, write_unpermuted
from tests.support.teachers import make_pixel_teacher_spec

WORDS = ["a cat", "", "the cat sat on a mat and looked at the cat ", "x", "cats and cats, " * 9, "z " * 40, "ünï"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("lm"), "llama", rows=320)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    texts = [f"{word} {number}" if word else "" for number in range(3) for word in WORDS]
    path.write_text("".join(json.dumps({"id": f"k{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def generate(data: Path | str, *teachers: Path | str, out: Path, **changes: Any) -> Any:
    options = {"temperature": 1.0, "preflight": False, "max_length": 48, **changes}
    specs = [one if isinstance(one, str) else f"lm:{one}" for one in teachers]
    return softlabel.generate(data, teachers=specs, out=out, **options)


def read_documents(root: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The key and the columns of each document, cut by the numbers of its tokens and positions."""
    with softlabel.open_store(root) as store:
        rows = store.take(np.arange(len(store)))
        per = {column.name: column.per for column in store.run.columns}
    edges = {"token": np.cumsum([0, *rows.lengths]), "position": np.cumsum([0, *rows.positions])}
    for number, key in enumerate(rows.keys):
        columns = {}
        for name, column in rows.columns.items():
            if per[name] == "row":
                columns[name] = column[number]
            else:
                start, stop = edges[per[name]][number : number + 2]
                columns[name] = column[start:stop]
        yield key, {**columns, "content": rows.content[number]}


@torch.no_grad()
def forward(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (L, C) of a plain forward pass of transformers, without the rows that no token has."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return model(torch.from_numpy(ids[None].astype(np.int64))).logits[0, :, :size].numpy()


@pytest.mark.parametrize("documents", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_the_command_line_labels_stories_as_numpy_does(documents: int, tmp_path: Path) -> None:
    stories = find_stories()
    data = f"{stories}/test.jsonl?rows=0:{documents}&key=id"
    options = ("--temperature", 1, "--temperatures", 1, 2, "--encoding", "topk", "--top-k", 32, "--batch-size", 8)
    printed = run_softlabel(
        *("generate", "--data", data, "--teacher", f"lm:{stories}", "--max-length", 320, *options),
        *("--out", tmp_path / "labels"),
    ).stdout
    assert "one later" in printed
    assert "aligned" in printed
    model, tokenizer = read_llama(stories), tokenizers.Tokenizer.from_file(str(stories / "tokenizer.json"))
    lines = [json.loads(line) for line in (stories / "test.jsonl").read_text().splitlines()[:documents]]
    found = dict(read_documents(tmp_path / "labels"))
    assert list(found) == [str(line["id"]) for line in lines]
    for line in lines:
        columns, ids = found[str(line["id"])], np.array(tokenizer.encode(line["text"]).ids, "<i4")
        assert columns["tokens"][:, 0].tolist() == ids.tolist()
        assert (columns["mask"] == 1).all()
        assert columns["content"] == xxhash.xxh3_64_intdigest(ids.tobytes())
        logits_LC = compute_logits(model, ids.tolist())
        for place, temperature in enumerate((1.0, 2.0)):
            expected = describe(logits_LC, k=32, temperature=temperature)
            np.testing.assert_allclose(columns["tail"][:, place], expected.tail, atol=2e-4)
            if temperature == 1:
                np.testing.assert_allclose(columns["value"], expected.value, rtol=1e-3, atol=2e-3)
                # Classes that are equal up to the rounding of float32 may change places.
                others = columns["index"] != expected.index
                assert others.mean() < 1e-3
                near = np.take_along_axis(logits_LC, columns["index"].astype(int), 1)
                np.testing.assert_allclose(near, np.take_along_axis(logits_LC, expected.index, 1), atol=1e-4)
    assert verify_store(tmp_path / "labels").ok


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_every_position_is_a_plain_forward_pass(architecture: str, data: Path, tmp_path: Path) -> None:
    fields = {"num_key_value_heads": 2, "head_dim": 8} if architecture == "gemma2" else {}
    folder = write_language_model(tmp_path / "lm", architecture, rows=300, **fields)
    summary = generate(data, folder, out=tmp_path / "labels", encoding="float32", temperature=2.0)
    assert (summary.total_rows, summary.total_bad) == (21, 0)
    for _, columns in read_documents(tmp_path / "labels"):
        logits = forward(folder, columns["tokens"][:, 0]) / 2
        assert columns["logits"].shape == logits.shape
        np.testing.assert_allclose(columns["logits"], logits - logits.max(axis=1, keepdims=True), atol=1e-4)


def test_a_label_does_not_depend_on_the_batch(teacher: Path, data: Path, tmp_path: Path) -> None:
    generate(data, teacher, out=tmp_path / "all")
    whole = dict(read_documents(tmp_path / "all"))
    for name, changes in {
        "workers": {"workers": 2, "shard_rows": 4},
        "small": {"batch_size": 2, "shard_positions": 60, "format": "hdf5"},
    }.items():
        generate(data, teacher, out=tmp_path / name, **changes)
        assert len(list((tmp_path / name / "shards").iterdir())) > 3
        for key, columns in read_documents(tmp_path / name):
            assert all(np.array_equal(columns[one], whole[key][one]) for one in columns), (name, key)
    costs = {
        name: softlabel.open_store(tmp_path / name).manifest.totals.fidelity for name in ("all", "workers", "small")
    }
    for cost in costs.values():
        assert cost is not None
        assert costs["all"] is not None
        assert (cost.mean_t, cost.worst_t) == pytest.approx((costs["all"].mean_t, costs["all"].worst_t), rel=1e-3)
    generate(f"{data}?rows=9:10", teacher, out=tmp_path / "alone")
    ((key, columns),) = read_documents(tmp_path / "alone")
    assert np.array_equal(columns["logits"], whole[key]["logits"])


def test_positions_that_count_alone(teacher: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 260, length).tolist() for length in (9, 1, 30, 12)]
    learnt = [[place % 3 == 1 for place in range(len(one))] for one in ids]
    learnt[3] = [False] * 12
    pq.write_table(pa.table({"ids": ids, "learn": learnt}), tmp_path / "ids.parquet")
    data = f"{tmp_path}/ids.parquet?tokens=ids&mask=learn"
    generate(data, teacher, out=tmp_path / "all")
    generate(data, teacher, out=tmp_path / "some", positions="masked")
    for (_, every), (_, some), one, of in zip(
        read_documents(tmp_path / "all"), read_documents(tmp_path / "some"), ids, learnt, strict=True
    ):
        counts = [*of[1:], False]  # what counts at a position is the token after it
        assert some["tokens"][:, 0].tolist() == one
        assert some["mask"][:, 0].tolist() == [int(count) for count in counts]
        assert np.array_equal(some["logits"], every["logits"][np.array(counts)])
    assert verify_store(tmp_path / "some").ok
    pq.write_table(pa.table({"ids": ids, "learn": [[False] * len(one) for one in ids]}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="expected positions to label, found none in 4 documents; check mask="):
        generate(f"{tmp_path}/none.parquet?tokens=ids&mask=learn", teacher, out=tmp_path / "no", positions="masked")


@pytest.mark.parametrize("rule", ["logits", "probs", "keep"])
def test_an_ensemble(rule: str, teacher: Path, data: Path, tmp_path: Path) -> None:
    other = write_language_model(tmp_path / "other", "gpt2", rows=263, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    generate(data, teacher, other, out=tmp_path / "labels", combine=rule, encoding="float32", temperature=2.0)
    for _, columns in read_documents(tmp_path / "labels"):
        ids = columns["tokens"][:, 0]
        scaled = [forward(folder, ids).astype(np.float64) / 2 for folder in (teacher, other)]
        logs = [one - np.logaddexp.reduce(one, axis=1, keepdims=True) for one in scaled]
        if rule == "keep":
            expected = np.stack(scaled, axis=1)
        else:
            expected = (scaled[0] + scaled[1]) / 2 if rule == "logits" else np.logaddexp(*logs)
        expected = expected - expected.max(axis=-1, keepdims=True)
        np.testing.assert_allclose(columns["logits"].reshape(expected.shape), expected, atol=1e-4)


def test_the_last_layer_is_stored_once(teacher: Path, data: Path, tmp_path: Path) -> None:
    generate(data, teacher, out=tmp_path / "labels", encoding="head")
    with softlabel.open_store(tmp_path / "labels") as store:
        rows = store.take(np.arange(len(store)))
        assert store.tokenizer == (teacher / "tokenizer.json").read_bytes()
    start = 0
    for _, columns in read_documents(tmp_path / "labels"):
        assert columns["hidden"].shape == (len(columns["tokens"]), 32)
        logits = forward(teacher, columns["tokens"][:, 0])
        stored = rows.scaled_logits[start : start + len(logits)]
        shifts = stored - logits
        np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1], shifts.shape), atol=2e-2)
        start += len(logits)


def test_labels_of_networks_with_a_cap_on_their_logits(data: Path, tmp_path: Path) -> None:
    """Every encoding has the capped logits, head with the cap beside the last layer, calibration included."""
    some = f"{data}?rows=0:7"
    capped = write_language_model(
        tmp_path / "capped", "gemma2", rows=300, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.7
    )
    encodings = {"float32": "float32", "topk": TopK(k=8), "head": "head", "int8": Head(hidden="int8")}
    for name, encoding in encodings.items():
        generate(some, capped, out=tmp_path / name, encoding=encoding, temperature=0.5, calibration=[1.25])
    expected = [forward(capped, one["tokens"][:, 0]) / (1.25 * 0.5) for _, one in read_documents(tmp_path / "float32")]
    logits_PC = np.concatenate(expected)
    assert 1.0 < np.abs(logits_PC).max() <= 0.7 / (1.25 * 0.5)
    relative_PC = logits_PC - logits_PC.max(axis=1, keepdims=True)
    for name, tolerance in (("float32", 1e-4), ("head", 2e-3), ("int8", 5e-2)):
        with softlabel.open_store(tmp_path / name) as store:
            rows = store.take(np.arange(len(store)))
            target = make_target(store.run, rows.columns, extra=store.extra)
        found = rows.scaled_logits - rows.scaled_logits.max(axis=1, keepdims=True)
        np.testing.assert_allclose(found, relative_PC, atol=tolerance)
        student_PC = torch.randn(relative_PC.shape, generator=torch.Generator().manual_seed(0))
        for t in (0.5, 2.0) if name != "float32" else (0.5,):
            log_p = torch.from_numpy(relative_PC * (0.5 / t)).double().log_softmax(1)
            loss = (log_p.exp() * (log_p - (student_PC.double() / t).log_softmax(1))).sum(1).mean() * t**2
            weights = {"temperature": t, "soft_weight": 1.0, "hard_weight": 0.0}
            for impl in ("torch", "reference"):
                assert float(distillation_loss(student_PC, target, impl=impl, **weights)) == pytest.approx(
                    float(loss), rel=tolerance
                )
            identity = torch.eye(student_PC.shape[1])
            fused = linear_distillation_loss(student_PC, identity, None, target, chunk_rows=7, **weights)
            assert float(fused) == pytest.approx(float(loss), rel=tolerance)
    for _, columns in read_documents(tmp_path / "topk"):
        scaled = forward(capped, columns["tokens"][:, 0]) / (1.25 * 0.5)
        kept = np.take_along_axis(scaled, columns["index"].astype(int), 1) - scaled.max(axis=1, keepdims=True)
        np.testing.assert_allclose(columns["value"], kept, atol=2e-3)
    stored = json.loads((tmp_path / "head" / "manifest.json").read_text())["run"]["encoding"]
    assert stored == {"name": "head", "width": 32, "hidden": "float16", "softcap": 0.7 / 1.25}
    assert verify_store(tmp_path / "head").ok
    convert_store(tmp_path / "head", tmp_path / "dense", encoding="float32")
    with softlabel.open_store(tmp_path / "dense") as store:
        np.testing.assert_allclose(store.take(np.arange(len(store))).scaled_logits, relative_PC, atol=2e-3)
    generate(some, capped, out=tmp_path / "head", encoding="head", temperature=0.5, calibration=[1.25])  # there already
    uncapped = shutil.copytree(capped, tmp_path / "other" / "capped")
    config = json.loads((capped / "config.json").read_text())
    (uncapped / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": None}))
    with pytest.raises(MismatchError, match="softcap"):
        generate(some, uncapped, out=tmp_path / "head", encoding="head", temperature=0.5, calibration=[1.25])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_the_last_layer_keeps_the_type_that_it_was_saved_in(kind: torch.dtype, data: Path, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "lm", "gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=64)
    some = f"{data}?rows=0:5"
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    network.save_pretrained(folder)
    generate(some, folder, out=tmp_path / "labels", encoding="head")
    convert_store(tmp_path / "labels", tmp_path / "hdf5", format="hdf5")
    weight_CD = network.lm_head.weight.detach()
    for root in (tmp_path / "labels", tmp_path / "hdf5"):
        (file,) = (root / "extra").glob("head-*.safetensors")
        assert load_file(file)["weight"].dtype == kind
        with softlabel.open_store(root) as store:
            assert np.array_equal(store.extra["weight"], weight_CD[: store.run.num_classes].float().numpy())
        assert verify_store(root).ok
    for _, columns in read_documents(tmp_path / "hdf5"):
        logits = columns["hidden"].astype(np.float32) @ weight_CD.float().numpy().T
        np.testing.assert_allclose(logits, forward(folder, columns["tokens"][:, 0]), atol=2e-2)


def test_truncated_labels_do_not_become_labels_of_all_classes(teacher: Path, data: Path, tmp_path: Path) -> None:
    generate(data, teacher, out=tmp_path / "labels", encoding=TopK(k=8))
    with pytest.raises(MismatchError, match="the sum of most classes alone"):
        convert_store(tmp_path / "labels", tmp_path / "dense", encoding="float16")
    printed = run_softlabel("verify", tmp_path / "labels", "--recompute", 9).stdout
    assert "scaled logits of the kept classes differ by" in printed
    assert float(printed.split(" at worst")[0].split()[-1]) < 0.02


def test_damaged_weights_are_one_line(teacher: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SpecError, match="damaged"):
        generate(data, tmp_path / "damaged", out=tmp_path / "labels")


def test_draws_follow_from_the_position(teacher: Path, data: Path, tmp_path: Path) -> None:
    generate(data, teacher, out=tmp_path / "all", encoding=Sampled(samples=8))
    generate(data, teacher, out=tmp_path / "small", encoding=Sampled(samples=8), shard_rows=4, batch_size=2)
    generate(data, teacher, out=tmp_path / "dense", encoding="float32")
    convert_store(tmp_path / "dense", tmp_path / "drawn", encoding=Sampled(samples=8))
    drawn = [dict(read_documents(tmp_path / name)) for name in ("all", "small", "drawn")]
    assert all(
        np.array_equal(drawn[0][key][name], other[key][name])
        for other in drawn[1:]
        for key in drawn[0]
        for name in ("index", "weight")
    )


@pytest.fixture(scope="module")
def bigrams(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, list[str]]:
    """A model that knows its data, what it says after each token, and the data, of the folder's texts.jsonl."""
    folder = tmp_path_factory.mktemp("bigrams")
    texts = write_documents(folder / "texts.jsonl", count=30, words=40)
    log_p_VV = write_bigrams(folder, texts)
    return folder, log_p_VV, texts


def test_what_is_measured_first(bigrams: tuple[Path, np.ndarray, list[str]], tmp_path: Path) -> None:
    folder, log_p_VV, texts = bigrams
    encode = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    options = ("--data", f"{folder}/texts.jsonl?id=id", "--teacher", f"lm:{folder}?buckets=8,256", "--temperature", 1)
    printed = run_softlabel("plan", *options, "--seconds", 0.1).stdout
    ids = [np.array(encode(text).ids) for text in texts]
    total = sum(map(len, ids))
    assert re.search(rf"{total:,} labelled positions, (\d{{3}}) of them measured", printed)
    found = re.search(r"accuracy of the next tokens at (\d{3}) sampled positions: (.*)", printed)
    assert found is not None
    right = np.concatenate([log_p_VV[one[:-1]].argmax(axis=1) == one[1:] for one in ids])
    assert float(found[2]) == pytest.approx(right.mean(), abs=4 * right.std() / int(found[1]) ** 0.5)

    encoding = ("--encoding", "topk", "--top-k", 300, "--out", tmp_path / "labels")
    printed = run_softlabel("generate", *options, *encoding).stdout
    assert re.search(r"encoding topk 263: .* at worst, over \d{3} positions\n", printed)
    shares = [-np.concatenate([log_p_VV[one[:-2], one[k : len(one) - 2 + k]] for one in ids]) for k in (1, 0, 2)]
    number = r"(\d+\.\d\d)"
    found = re.search(rf"NLL .*: {number} nats at its place, {number} .*, {number} one later, over (.*) pos", printed)
    assert found is not None
    assert [float(one) for one in found.groups()[:3]] == pytest.approx([one.mean() for one in shares], abs=6e-3)
    assert int(found[4].replace(",", "")) == len(shares[0])
    assert "aligned" in printed
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    printed = run_softlabel("generate", "--data", f"{folder}/empty.jsonl", *options[2:], "--out", tmp_path / "e").stdout
    assert "was not checked: no sampled document has 3 tokens" in printed


@pytest.mark.parametrize(("fault", "message"), [("shifted", "off by a position"), ("forgetful", "predicts better the")])
def test_faults_of_a_network_are_found(
    fault: str,
    message: str,
    bigrams: tuple[Path, np.ndarray, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = transformers.LlamaModel.forward

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        found = plain(self, *args, **named)
        hidden = found.last_hidden_state
        if fault == "shifted":
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        else:
            hidden = torch.cat([hidden[:, :24], 0.5 * hidden[:, 24:]], dim=1)
        found.last_hidden_state = hidden
        return found

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(TeacherError, match=message):
        generate(
            *(f"{bigrams[0]}/texts.jsonl", f"lm:{bigrams[0]}?buckets=8,256"),
            out=tmp_path / "labels",
            preflight=True,
            max_length=256,
        )


def test_faults_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stories = find_stories()
    data = f"{stories}/test.jsonl?rows=0:40"
    with pytest.raises(TeacherError, match=r"predicts better the more of a document.*query and key"):
        generate(data, write_unpermuted(stories, tmp_path / "unpermuted"), out=tmp_path / "a", preflight=True)
    plain = transformers.LlamaModel.forward

    def shifted(self: Any, *args: Any, **named: Any) -> Any:
        found = plain(self, *args, **named)
        hidden = found.last_hidden_state
        found.last_hidden_state = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        return found

    monkeypatch.setattr(transformers.LlamaModel, "forward", shifted)
    with pytest.raises(TeacherError, match="off by a position"):
        generate(data, stories, out=tmp_path / "b", preflight=True)


def test_another_tokenizer_does_not_go_on(teacher: Path, data: Path, tmp_path: Path) -> None:
    generate(data, teacher, out=tmp_path / "labels")
    other = write_language_model(tmp_path / "other", "llama", rows=320)
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["b"], vocab["c"] = vocab["c"], vocab["b"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="tokenizer"):
        generate(data, other, out=tmp_path / "labels")
    with pytest.raises(MismatchError, match=f"id {vocab['c']} is 'b' and 'c'"):
        generate(data, teacher, other, out=tmp_path / "both")
    generate(data, teacher, out=tmp_path / "kept", combine="keep")
    with pytest.raises(MismatchError, match=f"id {vocab['c']} is 'b' and 'c'"):
        extend(tmp_path / "kept", teacher=f"lm:{other}")


def test_documents_of_another_length_do_not_go_on(teacher: Path, data: Path, tmp_path: Path) -> None:
    """The longest document is named, and nothing that follows from it."""
    generate(f"{data}?rows=0:3", teacher, out=tmp_path / "labels")
    generate(f"{data}?rows=3:6", teacher, out=tmp_path / "others", max_length=40)
    with pytest.raises(MismatchError, match=r"run; longest document \(--max-length\): .* 48, this run 40; use"):
        generate(f"{data}?rows=0:3", teacher, out=tmp_path / "labels", max_length=40)
    with pytest.raises(MismatchError, match=r"the first: longest document \(--max-length\): .* 48, the other 40; '"):
        merge_stores([tmp_path / "labels", tmp_path / "others"], tmp_path / "merged")


def test_options_of_language_models(teacher: Path, data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"max_length": 65}, "max_length: expected at most 64"),
        ({"batch_size": "auto"}, "batch_size: auto is for samples of one size"),
        ({"members_in_turn": "yes"}, "members_in_turn"),
        ({"views": 2}, "views: 2 views are for images, found texts in .*; leave --views and --augment out"),
    ):
        with pytest.raises(UsageError, match=message):
            generate(data, teacher, out=tmp_path / "labels", **changes)
    for changes in ({"max_length": 8}, {"shard_positions": 9}, {"positions": "masked"}):
        with pytest.raises(UsageError, match="is for language models"):
            generate(
                "digits?rows=0:8", make_pixel_teacher_spec(8), out=tmp_path / "x", **{"max_length": None, **changes}
            )


def test_a_store_is_repaired_and_grows(teacher: Path, data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines(keepends=True)
    growing = tmp_path / "growing.jsonl"
    growing.write_text("".join(lines[:12]))
    generate(growing, teacher, out=tmp_path / "labels", shard_positions=100)
    growing.write_text("".join(lines))
    generate(growing, teacher, out=tmp_path / "labels", grow=True)
    generate(growing, teacher, out=tmp_path / "whole")
    whole = dict(read_documents(tmp_path / "whole"))
    victim = next((tmp_path / "labels" / "shards").iterdir())
    victim.write_bytes(b"")
    run_softlabel("repair", tmp_path / "labels")
    run_softlabel("verify", tmp_path / "labels", "--data", growing, "--recompute", 21)
    found = dict(read_documents(tmp_path / "labels"))
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[key]["logits"], whole[key]["logits"]) for key in whole)


def test_language_models_are_calibrated_by_their_next_tokens(teacher: Path, data: Path, tmp_path: Path) -> None:
    """All positions of documents of at most 16 tokens count."""
    found = softlabel.calibrate(f"{data}?rows=0:2", teachers=[f"lm:{teacher}"], out=tmp_path / "calibration.json")
    ids = [tokenizers.Tokenizer.from_file(str(teacher / "tokenizer.json")).encode("a cat 0").ids, [1]]
    logits = torch.from_numpy(np.concatenate([forward(teacher, np.array(one))[:-1] for one in ids])).double()
    labels = torch.tensor([token for one in ids for token in one[1:]])
    best = min(
        (float(torch.nn.functional.cross_entropy(logits / at, labels)), at) for at in np.geomspace(0.05, 50, 4000)
    )
    (member,) = found.members
    assert member.nll_before == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-4)
    assert member.temperature == pytest.approx(best[1], rel=5e-3)
    generate(data, teacher, out=tmp_path / "labels", calibration=tmp_path / "calibration.json", encoding="float32")
    for _, columns in read_documents(tmp_path / "labels"):
        expected = forward(teacher, columns["tokens"][:, 0]) / member.temperature
        np.testing.assert_allclose(columns["logits"], expected - expected.max(axis=1, keepdims=True), atol=1e-3)


def test_a_store_of_documents_gets_another_member(teacher: Path, data: Path, tmp_path: Path) -> None:
    """Also one whose shards are not what a new store would have."""
    other = write_language_model(tmp_path / "other", "gpt2", rows=263, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    generate(data, teacher, out=tmp_path / "labels", combine="keep", encoding="float32", shard_positions=100)
    run_softlabel("extend", tmp_path / "labels", "--teacher", f"lm:{other}")
    generate(data, teacher, other, out=tmp_path / "both", combine="keep", encoding="float32")
    both = dict(read_documents(tmp_path / "both"))
    assert len(list((tmp_path / "labels" / "shards").iterdir())) > 3
    for key, columns in read_documents(tmp_path / "labels"):
        np.testing.assert_allclose(columns["logits"], both[key]["logits"], atol=1e-5)
