"""``vllm:FOLDER``: everything but vLLM itself, whose place a module takes that answers in its shape.

L tokens of a document, K kept tokens.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabel
from softlabel.convert.recode import convert_store
from softlabel.errors import DataError, SpecError, UsageError
from softlabel.models.teacher import load_teacher
from softlabel.store.encodings import TopK
from softlabel.store.verify import verify_store
from tests.support.commands import run_softlabel
from tests.support.language_models import MARKED, write_language_model
from tests.support.language_runs import make_config, write_documents

# What vLLM's LLM, SamplingParams, RequestOutput and Logprob are, in so far as a teacher meets them: of a prompt's token
# the k most probable ids at its place with their ranks, and its own where it is none of them; None for the first.
VLLM = """
import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    max_tokens: int
    prompt_logprobs: int
    detokenize: bool


class LLM:
    def __init__(self, *, model, dtype, max_model_len, enable_prefix_caching, max_logprobs, logprobs_mode):
        assert (enable_prefix_caching, logprobs_mode, dtype) == (False, "raw_logprobs", "float32")
        self.longest, self.most = max_model_len, max_logprobs
        self.network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        asked = sampling_params
        assert (asked.temperature, asked.max_tokens, use_tqdm, asked.detokenize) == (1.0, 1, False, False)
        assert asked.prompt_logprobs <= self.most
        return [SimpleNamespace(prompt_logprobs=self.record(one["prompt_token_ids"], asked)) for one in prompts]

    def record(self, ids, asked):
        assert 1 < len(ids) < self.longest
        log_p = self.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [None]
        for place, token in enumerate(ids[1:]):
            order = log_p[place].argsort(descending=True).tolist()
            kept = order[: asked.prompt_logprobs]
            named = kept if token in kept else [token, *kept]
            found.append({
                one: SimpleNamespace(logprob=float(log_p[place, one]), rank=order.index(one) + 1, decoded_token=None)
                for one in named
            })
        if os.environ.get("FAULT") == "cached":
            found[1] = None
        if os.environ.get("FAULT") == "shifted":
            found = [*found[:1], *found[2:], found[1]]
        return found
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of that name, which the process imports."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "vllm.py").write_text(VLLM)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("vllm", None)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    # No padded rows: vLLM does not leave them out.
    write_language_model(folder / "teacher", "llama", rows=263, template=MARKED)
    write_documents(folder / "data.jsonl")
    chats = [[{"role": "user", "content": "hi " * n}, {"role": "assistant", "content": "the cat"}] for n in range(1, 6)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats))
    return folder


def generate(stories: Path, out: Path, kind: str = "vllm", data: str = "data.jsonl?key=id", **changes: Any) -> None:
    given = {"encoding": TopK(k=12), "temperature": 1.0, "progress": False, "max_length": 48, **changes}
    softlabel.generate(
        f"{stories}/{data}", teachers=[f"{kind}:{stories / 'teacher'}"], out=out, preflight=False, **given
    )


@pytest.mark.parametrize(("data", "positions"), [("data.jsonl?key=id", "all"), ("chats.jsonl", "masked")])
def test_labels_are_those_of_transformers_but_at_the_last_position(
    data: str, positions: str, stories: Path, vllm: Path, tmp_path: Path
) -> None:
    for kind in ("vllm", "lm"):
        generate(stories, tmp_path / kind, kind, data, positions=positions)
    rows = {}
    for kind in ("vllm", "lm"):
        with softlabel.open_store(tmp_path / kind) as store:
            rows[kind] = store.take(np.arange(len(store)))
            assert store.run.members[0].spec.startswith(f"{kind}:teacher")
            assert (store.manifest.totals.fidelity is None) == (kind == "vllm")
            assert store.tokenizer is not None
        assert verify_store(tmp_path / kind).ok
    ours, theirs = rows["vllm"], rows["lm"]
    assert ours.keys == theirs.keys
    assert np.array_equal(ours.columns["tokens"], theirs.columns["tokens"])
    missing = 1 if positions == "all" else 0
    assert np.array_equal(ours.positions, theirs.positions - missing)
    kept = np.ones(int(theirs.positions.sum()), bool)
    if missing:
        kept[np.cumsum(theirs.positions) - 1] = False
    # Tokens that are equal up to the rounding of float32 may change places.
    assert (ours.columns["index"] != theirs.columns["index"][kept]).mean() < 5e-3
    for name, tolerance in (("value", 2e-3), ("tail", 1e-4)):
        np.testing.assert_allclose(ours.columns[name], theirs.columns[name][kept], atol=tolerance)


def test_a_student_learns_from_an_engine(stories: Path, vllm: Path, tmp_path: Path) -> None:
    generate(stories, tmp_path / "labels")
    history = softlabel.train(make_config(stories, tmp_path / "run", labels=tmp_path / "labels", epochs=1)).history
    assert np.isfinite(history[0].loss)
    convert_store(tmp_path / "labels", tmp_path / "hdf5", format="hdf5")


def test_the_command_line(stories: Path, vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{vllm}:{Path(softlabel.__file__).parents[1]}")
    teacher = f"vllm:{stories / 'teacher'}"
    given = ("--data", f"{stories}/data.jsonl?key=id", "--teacher", teacher, "--max-length", 48, "--temperature", 1)
    printed = run_softlabel("plan", *given, "--encoding", "topk", "--seconds", 0.1).stdout
    assert "topk 50" in printed
    assert "not known" in printed
    wrong = run_softlabel("generate", *given, "--out", tmp_path / "labels", code=2).stderr
    assert "knows the most probable tokens alone, expected encoding topk, found float16" in wrong
    short = tmp_path / "short.jsonl"  # alone in the smallest bucket, where no document has an answer
    short.write_text((stories / "data.jsonl").read_text() + '{"id": "short", "text": ""}\n')
    options = ("--data", f"{short}?key=id", *given[2:], "--encoding", "topk")
    assert "topk 50" in run_softlabel("plan", *options, "--seconds", 0.1).stdout
    run_softlabel("generate", *options, "--no-preflight", "--out", tmp_path / "labelled")
    run_softlabel("verify", tmp_path / "labelled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "head"}, "encoding head: .*found logits alone"),
        ({"encoding": "float16"}, "expected encoding topk, found float16; give --encoding topk, or a teacher lm:"),
        ({"temperature": 2.0}, "at temperature 1 alone, found 2; give --temperature 1"),
        ({"encoding": TopK(k=4, temperatures=(1.0, 2.0))}, "at temperature 1 alone, found 1, 2"),
        ({"calibration": [1.5]}, "leave --calibration out"),
        ({"max_length": 65}, "max_length: expected at most 64"),
    ],
)
def test_what_an_engine_does_not_say_is_refused(
    changes: dict[str, Any], message: str, stories: Path, vllm: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(stories, tmp_path / "labels", **changes)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("cached", "record with enable_prefix_caching=False"), ("shifted", "they belong to other tokens or to another")],
)
def test_answers_of_other_documents_are_refused(
    fault: str, message: str, stories: Path, vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(DataError, match=message):
        generate(stories, tmp_path / "labels")


def test_an_engine_is_a_teacher_alone(stories: Path, vllm: Path, tmp_path: Path) -> None:
    teacher = stories / "teacher"
    with pytest.raises(UsageError, match="expected it alone, found 2 teachers"):
        softlabel.generate(
            f"{stories}/data.jsonl?key=id",
            teachers=[f"vllm:{teacher}", f"lm:{teacher}"],
            out=tmp_path / "labels",
            encoding=TopK(k=4),
            temperature=1.0,
        )
    with pytest.raises(SpecError, match="labels with 'softlabel generate' alone; give lm:"):
        softlabel.train(make_config(stories, tmp_path / "run", labels=None, soft_weight=0.0, student=f"vllm:{teacher}"))
    with pytest.raises(SpecError, match="labels with 'softlabel generate' alone; give lm:"):
        softlabel.evaluate(f"vllm:{teacher}", f"{stories}/data.jsonl?key=id")
    with pytest.raises(UsageError, match=r"knows the most probable tokens alone.*or a teacher lm:"):
        softlabel.calibrate(f"{stories}/data.jsonl?key=id", teachers=[f"vllm:{teacher}"])
    with pytest.raises(SpecError, match=r"expected no option but max_length, .*found 'layers'"):
        load_teacher(f"vllm:{teacher}?layers=1", kind="tokens")


def test_what_to_install_is_said(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"needs vLLM, which is not installed; pip install 'softlabel\[vllm\]'"):
        generate(stories, tmp_path / "labels")
