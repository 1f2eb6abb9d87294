"""``lm:python:file.py:function``: language models that code of the user's makes, as teachers and as students.

B lines, L positions of a line, C tokens of the vocabulary.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import softlabel
from softlabel.common.spec import parse_spec
from softlabel.dataset import open_source, tokenize_source
from softlabel.errors import MismatchError, SpecError, UsageError
from softlabel.inputs.vocabulary import read_vocabulary
from softlabel.models import LanguageModel, build_model
from softlabel.models.teacher import load_teacher
from tests.support.language_models import write_tokenizer
from tests.support.language_runs import make_config, write_documents
from tests.support.training_runs import have_equal_weights, read_history, read_weights

SIZE = 263
NETS = """
import os
from types import SimpleNamespace

import torch
from torch import nn


class Net(nn.Module):
    '''The mean of what a document had so far, in the ways in which a network can say it.'''

    max_length = 48

    def __init__(self, vocab_size, form="tensor", width=12):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.mix = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocab_size + 9)
        self.form = form
        self.calls = 0
        if form == "scaled":
            self.logit_scale, self.softcap = 0.5, 2.0

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.calls += 1
        if self.training and str(self.calls) == os.environ.get("STOP_AT"):
            raise KeyboardInterrupt
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        starts = places if position_ids is None else position_ids
        first = places - starts if position_ids is not None else places * 0
        seen = (places[:, None] >= places) & (places >= first.reshape(-1, 1, len(places)).mT)
        weights = seen / seen.sum(-1, keepdim=True)
        hidden = torch.tanh(self.mix(weights @ self.embed(input_ids))) + self.embed(input_ids)
        if self.form in ("hidden", "scaled"):
            return SimpleNamespace(last_hidden_state=hidden)
        logits = self.lm_head(hidden)
        return {"tensor": logits, "tuple": (logits, None), "mapping": {"logits": logits}}[self.form]


class Forward(Net):
    def forward(self, input_ids):
        return super().forward(input_ids.flip(1)).flip(1)


class Narrow(Net):
    def __init__(self):
        super().__init__(263)
        self.lm_head = nn.Linear(12, 29)


class Last(Net):
    def forward(self, input_ids):
        return super().forward(input_ids)[:, -1:]


class Broken(Net):
    def forward(self, input_ids):
        raise RuntimeError("not\\ntoday")


class Overflowed(Net):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        nn.init.constant_(self.lm_head.bias, float("nan"))


class Counting(Net):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids) * attention_mask.sum(1)[:, None, None] / 8


class Placing(Net):
    def forward(self, input_ids, attention_mask, position_ids):
        return super().forward(input_ids, position_ids=position_ids) * attention_mask[..., None]


def llama(vocab_size):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **sizes))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks in a file, weights of one, a tokenizer, 40 documents, and their labels by the network."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets.py").write_text(NETS)
    write_tokenizer(folder / "tokenizer")
    write_documents(folder / "data.jsonl")
    torch.manual_seed(7)
    model = build_model(f"lm:python:{folder}/nets.py:Net?tokenizer={folder / 'tokenizer'}")
    assert isinstance(model, LanguageModel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_file(model.network.state_dict(), folder / "net.safetensors")
    generate(folder, folder / "labels", encoding="float32")
    return folder


def name_teacher(folder: Path, form: str = "tensor") -> str:
    return f"lm:python:{folder}/nets.py:Net@{folder}/net.safetensors?tokenizer={folder / 'tokenizer'}&form={form}"


def generate(folder: Path, out: Path, form: str = "tensor", **changes: Any) -> None:
    given = {"temperature": 2.0, "preflight": False, "progress": False, "max_length": 48, **changes}
    softlabel.generate(f"{folder}/data.jsonl?key=id", teachers=[name_teacher(folder, form)], out=out, **given)


def read_logits(root: Path) -> np.ndarray[Any, Any]:
    with softlabel.open_store(root) as store:
        logits: np.ndarray[Any, Any] = store.take(np.arange(len(store))).scaled_logits
    return logits


def answer(model: torch.nn.Module, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    """Logits (L, C) of one document by the module itself."""
    with torch.no_grad():
        output = model(torch.from_numpy(ids.astype(np.int64))[None])
    logits: torch.Tensor = output[0, :, :SIZE]
    return logits


def test_labels_are_what_the_module_says(nets: Path) -> None:
    model = build_model(name_teacher(nets)).network.eval()
    source = tokenize_source(
        open_source(f"{nets}/data.jsonl?key=id"), read_vocabulary(nets / "tokenizer"), max_length=48
    )
    logits = torch.cat([answer(model, one.raw.ids) for one in source.read(range(len(source)))]) / 2  # type: ignore[union-attr]
    expected = logits - logits.amax(dim=1, keepdim=True)
    np.testing.assert_allclose(read_logits(nets / "labels"), expected, atol=1e-5)
    with softlabel.open_store(nets / "labels") as store:
        assert store.run.members[0].spec == "lm:python:nets.py:Net?form=tensor"
        assert (store.run.num_classes, store.tokenizer) == (SIZE, (nets / "tokenizer/tokenizer.json").read_bytes())


@pytest.mark.parametrize("form", ["tuple", "mapping", "hidden", "scaled"])
def test_every_form_of_answer_gives_the_same_labels(form: str, nets: Path, tmp_path: Path) -> None:
    generate(nets, tmp_path / "labels", form, encoding="head" if form == "hidden" else "float32")
    expected, found = read_logits(nets / "labels"), read_logits(tmp_path / "labels")
    if form == "scaled":
        expected = 2 * np.tanh(2 * read_raw(nets) * 0.5 / 2) / 2
        expected -= expected.max(axis=1, keepdims=True)
    found = found - found.max(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-2 if form == "hidden" else 1e-5)


def read_raw(nets: Path) -> np.ndarray[Any, Any]:
    """The module's logits / 2 without a maximum subtracted."""
    model = build_model(name_teacher(nets)).network.eval()
    source = tokenize_source(
        open_source(f"{nets}/data.jsonl?key=id"), read_vocabulary(nets / "tokenizer"), max_length=48
    )
    parts = [answer(model, one.raw.ids) for one in source.read(range(len(source)))]  # type: ignore[union-attr]
    return torch.cat(parts).numpy() / 2


def test_students_learn_the_same_from_logits_and_from_hidden_states(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is that of the labels; the run folder is whole but for the code; an interrupted run goes on."""
    shutil.copy(nets / "nets.py", tmp_path / "mine.py")
    results = {}
    for form in ("tensor", "hidden"):
        config = make_config(nets, tmp_path / form, student=f"lm:python:{tmp_path}/mine.py:Net?form={form}", epochs=2)
        results[form] = softlabel.train(config)
    for one, other in zip(results["tensor"].history, results["hidden"].history, strict=True):
        for figure in ("loss", "soft_loss", "hard_loss", "train_accuracy", "teacher_agreement"):
            assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=1e-4), figure
    weights = read_weights(tmp_path / "hidden")
    for name, value in read_weights(tmp_path / "tensor").items():
        assert torch.allclose(value, weights[name], atol=1e-4), name

    monkeypatch.setenv("STOP_AT", "9")
    stopped = make_config(nets, tmp_path / "stopped", student=f"lm:python:{tmp_path}/mine.py:Net?form=tensor", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        softlabel.train(stopped)
    monkeypatch.delenv("STOP_AT")
    softlabel.train(stopped)
    assert have_equal_weights(tmp_path / "stopped", tmp_path / "tensor")
    assert read_history(tmp_path / "stopped") == read_history(tmp_path / "tensor")

    data, run = f"{nets}/data.jsonl?key=id", f"run:{tmp_path / 'tensor'}"
    figures = softlabel.evaluate(run, data, labels=nets / "labels", progress=False)
    assert figures.teacher_kl is not None
    model = build_model(run).network.eval()
    source = tokenize_source(open_source(data), read_vocabulary(tmp_path / "tensor"), max_length=48)
    losses = []
    for one in source.read(range(len(source))):
        ids = one.raw.ids  # type: ignore[union-attr]
        losses.append(
            torch.nn.functional.cross_entropy(answer(model, ids)[:-1], torch.tensor(ids[1:]).long(), reduction="none")
        )
    assert figures.cross_entropy == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_a_network_of_transformers_is_taken_apart(nets: Path, tmp_path: Path) -> None:
    spec = f"lm:python:{nets}/nets.py:llama"
    softlabel.train(make_config(nets, tmp_path / "run", student=spec, epochs=1))
    again = load_teacher(f"run:{tmp_path / 'run'}", kind="tokens").model
    assert isinstance(again, LanguageModel)
    assert again.head_weight.shape == (SIZE, 16)


def test_a_module_of_the_current_folder(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    spec = parse_spec(f"lm:python:my_own_nets:Net@{nets}/net.safetensors?tokenizer={nets / 'tokenizer'}&width=12")
    assert load_teacher(spec.text, kind="tokens").num_classes == SIZE
    assert spec.identity == "lm:python:my_own_nets:Net?width=12"
    assert not parse_spec("lm:python:my_own_nets:Net").starts_trained


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Net", "", r"expected the tokenizer of the network, found none; give '\?tokenizer=FOLDER'"),
        ("Net", "form=odd", r"fails on a probe: KeyError"),
        ("Net", "max_length=49", "max_length: expected at most 48"),
        ("Net", "colour=3", "its builder refuses the options"),
        ("Forward", "", "the answers of Forward depend on later tokens; mask its attention"),
        ("Overflowed", "", "expected finite logits, found that those of Overflowed are not finite"),
        ("Narrow", "", "at least 263 rows, one for each token of tokenizer.json, found 29"),
        ("Last", "", r"expected logits \(B, L, V\) of all positions.*found logits torch.float32 \(2, 1, 272\) for ids"),
        ("Broken", "", "fails on a probe: RuntimeError: not today"),
        ("Nothing", "", "cannot import it"),
    ],
)
def test_what_is_no_language_model_is_refused(name: str, options: str, message: str, nets: Path) -> None:
    given = options if "tokenizer of" in message else f"tokenizer={nets / 'tokenizer'}&{options}"
    with pytest.raises(SpecError, match=message) as error:
        load_teacher(f"lm:python:{nets}/nets.py:{name}?{given}", kind="tokens")
    assert "\n" not in str(error.value)


def test_logits_alone_have_no_last_layer_to_store(nets: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"encoding head: .*the answer of a linear layer, found logits alone"):
        generate(nets, tmp_path / "labels", encoding="head")


def test_documents_that_see_each_other_are_not_packed(nets: Path, tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text(
        NETS.replace("attention_mask=None, position_ids=None):", "attention_mask=None):\n        position_ids = None")
    )
    student = f"lm:python:{tmp_path}/deaf.py:Net"
    with pytest.raises(SpecError, match="those of Net see each other"):
        softlabel.train(make_config(nets, tmp_path / "packed", student=student, epochs=1))
    softlabel.train(make_config(nets, tmp_path / "padded", student=student, epochs=1, pack=None, pad=48))


def test_a_forward_that_requires_the_mask_gets_that_of_its_document(nets: Path, tmp_path: Path) -> None:
    """The answers of `Counting` grow with the number of tokens that the mask has."""
    spec, data = f"lm:python:{nets}/nets.py:Counting", f"{nets}/data.jsonl?key=id"
    teacher = f"{spec}@{nets}/net.safetensors?tokenizer={nets / 'tokenizer'}"
    model = build_model(teacher).network.eval()
    source = tokenize_source(open_source(data), read_vocabulary(nets / "tokenizer"), max_length=48)
    answers, losses = [], []
    for one in source.read(range(len(source))):
        ids = torch.from_numpy(one.raw.ids).long()  # type: ignore[union-attr]
        with torch.no_grad():
            answers.append(model(ids[None], torch.ones_like(ids)[None])[0, :, :SIZE])
        losses.append(torch.nn.functional.cross_entropy(answers[-1][:-1], ids[1:], reduction="none"))
    settings: dict[str, Any] = {"encoding": "float32", "temperature": 1.0, "max_length": 48, "preflight": False}
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "labels", progress=False, **settings)
    expected = torch.cat(answers)
    expected -= expected.amax(dim=1, keepdim=True)
    np.testing.assert_allclose(read_logits(tmp_path / "labels"), expected, atol=1e-4)
    figures = softlabel.evaluate(teacher, data, progress=False)
    assert figures.cross_entropy == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    softlabel.train(make_config(nets, tmp_path / "padded", student=spec, epochs=1, pack=None, pad=48))
    with pytest.raises(SpecError, match="those of Counting see each other"):
        softlabel.train(make_config(nets, tmp_path / "packed", student=spec, epochs=1))


@pytest.mark.parametrize("changes", [{}, {"pack": None, "pad": 48}], ids=["packed", "padded"])
def test_a_forward_that_requires_mask_and_positions_learns_as_one_that_does_not(
    changes: dict[str, Any], nets: Path, tmp_path: Path
) -> None:
    for name in ("Net", "Placing"):
        student = f"lm:python:{nets}/nets.py:{name}"
        softlabel.train(make_config(nets, tmp_path / name, student=student, epochs=1, **changes))
    assert have_equal_weights(tmp_path / "Net", tmp_path / "Placing")


def test_another_vocabulary_than_that_of_the_labels_is_refused(nets: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other", added=["<more>"])
    student = f"lm:python:{nets}/nets.py:Net?tokenizer={tmp_path / 'other'}"
    with pytest.raises(MismatchError, match=r"expected the vocabulary of the labels .*id 263 is no token and"):
        softlabel.train(make_config(nets, tmp_path / "run", student=student, epochs=1))
