"""Language models as students: what they compute, what they leave behind, and that an interruption changes nothing.

N documents, B lines, L positions of a line, P positions that count, V tokens.
"""

import json
import math
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

import softlabel
from softlabel import train
from softlabel.dataset import open_source
from softlabel.dataset.tokenize import tokenize_source
from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.language import TokenEvaluation
from softlabel.inputs.vocabulary import read_vocabulary
from softlabel.loader.token_loader import TokenLoader
from softlabel.models import LanguageModel, build_model
from softlabel.store.token_rows import TokenRun
from softlabel.training.ema import Average
from tests.support.documents import Documents, make_token_run
from tests.support.language_models import MARKED, write_language_model
from tests.support.language_runs import (
    LONGEST,
    T,
    compute_answers,
    make_config,
    make_settings,
    write_documents,
    write_labels,
)
from tests.support.stores import write_store
from tests.support.training_runs import (
    have_equal_weights,
    read_history,
    read_weights,
    start_training,
    train_in_ranks,
    wait_for_file,
)

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with tied embeddings and more rows than tokens, 40 documents, and a store of its answers."""
    folder = tmp_path_factory.mktemp("stories")
    write_language_model(folder / "teacher", "llama", rows=270, tie_word_embeddings=True)
    texts = write_documents(folder / "data.jsonl")
    write_labels(folder / "labels", folder / "teacher", texts)
    write_labels(folder / "top8", folder / "teacher", texts, top_k=8)
    return folder


# ---- what it computes ----


@pytest.mark.parametrize("lines", [{"pack": 64}, {"pack": None, "pad": 48}])
def test_equals_a_plain_loop(stories: Path, tmp_path: Path, lines: dict[str, int | None]) -> None:
    """The same steps in plain torch and transformers, float64: each document by itself, logits of all positions."""
    given = make_config(stories, tmp_path / "run", epochs=2, seed=5, accumulate=2, clip_norm=1.0, **lines)
    result = train(given)

    torch.manual_seed(5)
    model = build_model(given.student)
    assert isinstance(model, LanguageModel)
    network = model.network.double()
    source = tokenize_source(open_source(given.data), model.vocabulary, max_length=LONGEST)
    loader = TokenLoader(source, stories / "labels", batch_tokens=256, seed=5, tail="drop", **lines)
    optimiser = torch.optim.AdamW(network.parameters(), lr=given.lr, weight_decay=5e-4)
    steps, warmup = len(loader), len(loader)
    losses: list[list[float]] = [[], []]
    right = agreed = 0
    for epoch in range(2):
        for step, batch in enumerate(loader):
            done = epoch * steps + step
            share = (
                (done + 1) / (warmup + 1) if done < warmup else math.cos(math.pi * (done - warmup) / steps) / 2 + 0.5
            )
            optimiser.param_groups[0]["lr"] = given.lr * share
            z, next_token = [], []
            for sample in batch.samples.tolist():
                ids = torch.from_numpy(source.read([sample])[0].raw.ids.astype(np.int64))
                z.append(network(input_ids=ids[None]).logits[0, :, : model.vocabulary.size])
                next_token.append(torch.cat([ids[1:], torch.tensor([-100])]))
            z_PV, y_P = torch.cat(z), torch.cat(next_token)
            teacher_PV = batch.target.scaled_logits.double()
            p, log_p = teacher_PV.softmax(1), teacher_PV.log_softmax(1)
            soft = T**2 * (p * (log_p - (z_PV / T).log_softmax(1))).sum(1).mean()
            hard = -z_PV.log_softmax(1)[y_P >= 0].gather(1, y_P[y_P >= 0, None]).mean()
            loss = 0.9 * soft + 0.1 * hard
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            losses[epoch].append(loss.item())
            if epoch == 1:
                right += int((z_PV.argmax(1) == y_P).sum())
                agreed += int((z_PV.argmax(1) == teacher_PV.argmax(1)).sum())
    for name, value in read_weights(tmp_path / "run").items():
        expected = network.state_dict()[name].float()
        assert torch.allclose(value, expected, rtol=1e-3, atol=2e-4), name
    # The mean over positions, of which steps have different numbers.
    assert [epoch.loss for epoch in result.history] == pytest.approx([np.mean(one) for one in losses], rel=2e-2)
    last, positions = result.history[-1], int(source.lengths.sum())
    assert last.loss == pytest.approx(0.9 * last.soft_loss + 0.1 * last.hard_loss, rel=1e-3)
    assert last.teacher_agreement == pytest.approx(agreed / positions, abs=0.01)
    assert last.train_accuracy == pytest.approx(right / (positions - len(source)), abs=0.01)


def test_packing_and_padding_learn_the_same(stories: Path, tmp_path: Path) -> None:
    """One batch of all documents: what is beside a document changes nothing, nor does how the batch is cut."""
    given = {"batch_tokens": 4096, "epochs": 2, "optimizer": "sgd", "lr": 0.1, "ema": 0.9}
    runs = {"packed": {}, "padded": {"pack": None, "pad": 48}, "cut": {"pack": 100, "accumulate": 3}}
    histories = {
        name: train(make_config(stories, tmp_path / name, **given, **rest)).history for name, rest in runs.items()
    }
    for name in ("padded", "cut"):
        for one, other in zip(histories["packed"], histories[name], strict=True):
            for figure in ("loss", "soft_loss", "hard_loss", "target_entropy"):
                assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=1e-5), (name, figure)
        for weight, expected in read_weights(tmp_path / "packed").items():
            assert torch.allclose(read_weights(tmp_path / name)[weight], expected, atol=1e-5), (name, weight)


def test_positions_that_do_not_count_change_nothing(stories: Path, tmp_path: Path) -> None:
    """Other labels of masked positions, which a store of all positions has too."""
    vocabulary = read_vocabulary(stories / "teacher")
    tokens = TokenRun(tokenizer=vocabulary.fingerprint, max_length=LONGEST)
    documents = Documents.of(make_token_run(samples=20, classes=vocabulary.size, tokens=tokens), seed=4)
    for mask in documents.masks:
        mask[-1] = 0
    rows = zip(documents.keys, documents.ids, documents.masks, strict=True)
    # A position counts where the token after it does.
    lines = [{"id": key, "tokens": ids.tolist(), "mask": [0, *mask.tolist()[:-1]]} for key, ids, mask in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, moved in (("some", 0), ("others", 5)):
        logits = [one.copy() for one in documents.logits[0]]
        for one, mask in zip(logits, documents.masks, strict=True):
            one[mask == 0] = np.roll(one[mask == 0], moved, axis=1)
        write_store(tmp_path / name, documents.run, replace(documents, logits=[logits]), fidelity=None)
        data = f"{tmp_path / 'data.jsonl'}?tokens=tokens&mask=mask&key=id"
        train(make_config(stories, tmp_path / f"of-{name}", data=data, labels=tmp_path / name, epochs=1))
    assert have_equal_weights(tmp_path / "of-some", tmp_path / "of-others")
    assert read_history(tmp_path / "of-some") == read_history(tmp_path / "of-others")


def test_a_killed_run_goes_on_as_if_nothing_had_happened(stories: Path, tmp_path: Path) -> None:
    rest = {"epochs": 6, "checkpoint_minutes": 1e-4, "ema": 0.99, "batch_tokens": 128}
    killed = make_settings(stories, tmp_path / "killed", **rest)
    process = start_training(killed)
    for _ in range(2):
        checkpoint = tmp_path / "killed" / "checkpoint.pt"
        wait_for_file(checkpoint, process, checkpoint.read_bytes() if checkpoint.exists() else b"")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as the other process had
    try:
        resumed = train(make_config(stories, tmp_path / "killed", **rest))
        train(make_config(stories, tmp_path / "straight", **rest))
    finally:
        torch.set_num_threads(threads)
    assert len(resumed.history) == 6
    assert have_equal_weights(tmp_path / "straight", tmp_path / "killed")
    assert read_history(tmp_path / "straight") == read_history(tmp_path / "killed")


def test_the_labels_of_chats_are_those_of_all_or_of_the_positions_that_count(tmp_path: Path) -> None:
    """From the chats to the weights: a store of masked positions is as good as one of all of them, bit for bit."""
    teacher = write_language_model(tmp_path / "teacher", "llama", rows=270, template=MARKED)
    turns = [[("user", "hi " * (1 + n % 3)), ("assistant", "the cat"[n % 5 :]), ("user", "more")] for n in range(20)]
    chats = [[{"role": role, "content": text} for role, text in one] for one in turns]
    lines = [{"id": f"chat-{number}", "messages": one} for number, one in enumerate(chats)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"{tmp_path / 'chats.jsonl'}?messages=messages&key=id"
    for positions in ("all", "masked"):
        softlabel.generate(
            data,
            teachers=[f"lm:{teacher}"],
            out=tmp_path / positions,
            positions=positions,
            max_length=64,
            preflight=False,  # a random teacher knows no chats
            progress=False,
        )
        train(make_config(tmp_path, tmp_path / f"of-{positions}", data=data, labels=tmp_path / positions, epochs=1))
    assert have_equal_weights(tmp_path / "of-all", tmp_path / "of-masked")
    assert read_history(tmp_path / "of-all") == read_history(tmp_path / "of-masked")


def test_epochs_of_different_numbers_of_steps_share_one_schedule(stories: Path, tmp_path: Path) -> None:
    """Documents of another window of the packing fill more or fewer lines; the rate still ends where it is to end."""
    lengths = np.random.default_rng(0).integers(3, 8, 4600).tolist()
    lines = [json.dumps({"id": str(number), "tokens": [1] * length}) for number, length in enumerate(lengths)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    rest = {
        "data": f"{tmp_path / 'data.jsonl'}?tokens=tokens&key=id",
        "labels": None,
        "batch_tokens": 369 * 7,
        "pack": 7,
    }
    history = train(make_config(stories, tmp_path / "run", epochs=2, **rest)).history
    assert [epoch.step for epoch in history] == [10, 10 + 9]
    last = 0.003 * (1 + math.cos(math.pi * 8 / 9)) / 2
    assert [epoch.lr for epoch in history] == pytest.approx([0.003 * 10 / 11, last])


def test_weights_with_two_names_are_averaged_once() -> None:
    tied, plain = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    model = torch.nn.Sequential(tied, plain, torch.nn.Linear(3, 3, bias=False))
    model[2].weight = tied.weight
    average = Average(model, 0.9)
    before = tied.weight.detach().clone()
    with torch.no_grad():
        tied.weight += 1
    average.update(model)
    assert torch.allclose(average.model[2].weight, before + (1 - 2 / 11), atol=1e-6)
    assert average.model[2].weight is average.model[0].weight


@pytest.mark.slow
def test_two_processes_train_as_one(stories: Path, tmp_path: Path) -> None:
    """Also where a batch has fewer lines than processes, and some documents have no row in the store."""
    lines = (stories / "data.jsonl").read_text() + json.dumps({"id": "another", "text": "the cat and the mat"}) + "\n"
    (tmp_path / "more.jsonl").write_text(lines)
    data = f"{tmp_path / 'more.jsonl'}?key=id"
    rest = {"data": data, "missing": "hard-only", "accumulate": 2, "epochs": 2, "batch_tokens": 320, "eval_data": data}
    train(make_config(stories, tmp_path / "one", **rest))
    train_in_ranks(make_settings(stories, tmp_path / "two", **rest), ranks=2)
    for one, two in zip(read_history(tmp_path / "one"), read_history(tmp_path / "two"), strict=True):
        for name, value in one.items():
            assert (value == "") == (two[name] == ""), name
            assert value == "" or float(value) == pytest.approx(float(two[name]), rel=2e-4, abs=2e-5), name
    ours, theirs = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=1e-4), name


def test_several_students_of_one_pass_are_those_of_passes_of_their_own(stories: Path, tmp_path: Path) -> None:
    rest = {"epochs": 2, "labels": stories / "top8", "eval_data": f"{stories / 'data.jsonl'}?key=id"}
    together = train(make_config(stories, tmp_path / "both", lr=[0.003, 0.001], **rest))
    alone = train(make_config(stories, tmp_path / "alone", lr=0.001, **rest))
    assert have_equal_weights(tmp_path / "both" / "lr0.001", tmp_path / "alone")
    assert [student.name for student in together.students] == ["lr0.003", "lr0.001"]
    last = alone.history[-1]
    assert last.headline == ("perplexity", last.eval_perplexity)
    assert last.eval_perplexity == pytest.approx(np.exp(last.eval_cross_entropy))
    assert alone.student.best == last
    assert last.teacher_accuracy is not None
    (both,) = [student for student in together.students if student.name == "lr0.001"]
    assert both.history[-1].eval_perplexity == last.eval_perplexity
    assert re.search(rf"lr0.001 .* {last.eval_perplexity:.4f} +{last.eval_perplexity:.4f} ", together.table())


LOGITS = """
from types import SimpleNamespace

from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(263, 8), nn.Linear(8, 263))
        self.layers[1].bias.data[FREQUENT] = 9.0

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.layers(input_ids))
"""


@pytest.mark.parametrize("answers", ["hidden", "logits"])
def test_figures_of_soft_labels_alone_are_of_the_positions_that_have_one(
    stories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, answers: str
) -> None:
    """One step, so that the figures are those of the first weights."""
    caplog.set_level("INFO", logger="softlabel")
    encode = read_vocabulary(stories / "teacher").tokenizer.load().encode
    lines = [json.loads(line) for line in (stories / "data.jsonl").read_text().splitlines()]
    rows = [{"id": one["id"], "tokens": encode(one["text"]).ids} for one in lines]
    others = [{"id": f"new-{n}", "tokens": encode(f"birds {n} on a tree").ids} for n in range(9)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *others, {"id": "empty", "tokens": []}]))
    settings = {"data": f"{data}?tokens=tokens&id=id", "missing": "hard-only", "hard_weight": 0, "epochs": 1}
    if answers == "logits":
        frequent = int(np.bincount(np.concatenate([row["tokens"][1:] for row in rows])).argmax())
        (tmp_path / "net.py").write_text(LOGITS.replace("FREQUENT", str(frequent)))
        settings["student"] = f"lm:python:{tmp_path}/net.py:Net?tokenizer={stories / 'teacher'}"
    given = make_config(stories, tmp_path / "run", batch_tokens=8192, seed=3, **settings)
    (last,) = train(given).history
    torch.manual_seed(3)
    model = build_model(given.student)
    assert isinstance(model, LanguageModel)
    ids = [np.array(row["tokens"]) for row in rows]
    found = compute_answers(model, ids)
    right = np.concatenate([one[:-1].argmax(axis=1) == of[1:] for one, of in zip(found, ids, strict=True)])
    assert right.any()
    assert last.train_accuracy == pytest.approx(right.mean(), abs=1e-9)
    assert "left out: 1 documents that have no token" in caplog.text
    assert re.search(r"49 documents, .* tokens in (\d+) lines of 64 .*, 1 step of \1 lines an epoch", caplog.text)


# ---- what it leaves behind ----


def test_a_run_is_a_teacher_and_a_folder_of_transformers(stories: Path, tmp_path: Path) -> None:
    train(make_config(stories, tmp_path / "run", epochs=1))
    model = build_model(f"run:{tmp_path / 'run'}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids, torch.ones_like(ids)), theirs(input_ids=ids).logits[..., :263], atol=1e-5)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (stories / "teacher" / "tokenizer.json").read_bytes()
    recorded = json.loads((tmp_path / "run" / "model.json").read_text())
    assert recorded["preprocessing"]["max_length"] == LONGEST
    more = train(make_config(stories, tmp_path / "more", student=f"run:{tmp_path / 'run'}", epochs=1))
    assert more.history[-1].loss < 10


# ---- how it is measured ----


@pytest.mark.parametrize("labels", ["labels", "top8"])
def test_evaluation_against_transformers_in_float64(stories: Path, tmp_path: Path, labels: str) -> None:
    model = build_model(f"lm:{stories / 'teacher'}?init=random&layers=1&seed=3")
    assert isinstance(model, LanguageModel)
    source = tokenize_source(open_source(f"{stories / 'data.jsonl'}?key=id"), model.vocabulary, max_length=LONGEST)
    found = softlabel.evaluate(
        model, f"{stories / 'data.jsonl'}?key=id", stories / labels, batch_size=128, device="cpu", progress=False
    )
    assert isinstance(found, TokenEvaluation)
    ids = [one.raw.ids for one in source.read(range(len(source)))]
    ours = [one - logsumexp(one, axis=1, keepdims=True) for one in compute_answers(model, ids)]
    teacher = build_model(f"lm:{stories / 'teacher'}")
    assert isinstance(teacher, LanguageModel)
    theirs = compute_answers(teacher, ids)
    nats, right, confident = [], [], []
    for one, log_q in zip(ids, ours, strict=True):
        nats += (-log_q[np.arange(len(one) - 1), one[1:]]).tolist()
        right += (log_q[:-1].argmax(axis=1) == one[1:]).tolist()
        confident += np.exp(log_q[:-1].max(axis=1)).tolist()
    assert (found.samples, found.tokens, found.labelled) == (40, sum(map(len, ids)), len(nats))
    assert found.cross_entropy == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    assert found.accuracy == pytest.approx(np.mean(right), abs=1e-9)
    bins = np.ceil(np.array(confident) * 15)
    off = [abs(sum(np.array(right)[bins == b]) - sum(np.array(confident)[bins == b])) for b in np.unique(bins)]
    assert found.calibration_error == pytest.approx(sum(off) / len(nats), abs=1e-5)
    # As all other figures: at the positions that have a next token.
    q, t = (np.concatenate([one[:-1] for one in found]) for found in (ours, theirs))
    p = softmax(t / T, axis=1)
    q = softmax(q / T, axis=1)
    if labels == "top8":
        kept = np.argsort(-p, axis=1, kind="stable")[:, :8]
        p, q = (np.take_along_axis(one, kept, axis=1) for one in (p, q))
        p, q = (np.concatenate([one, 1 - one.sum(axis=1, keepdims=True)], axis=1) for one in (p, q))
    assert found.teacher_kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=2e-3)
    assert found.teacher_kl_kind == ("exact" if labels == "labels" else "bucketed")
    assert found.with_teacher == found.labelled
    agreed = t.argmax(axis=1) == np.concatenate([one[:-1] for one in ours]).argmax(axis=1)
    assert found.agreement == pytest.approx(agreed.mean(), abs=2e-3)
    assert json.loads(json.dumps(found.to_dict()))["perplexity"] == found.perplexity


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": None}, "pack and pad: expected one of them for a language model"),
        ({"pad": 48}, "pack and pad: expected one of them, the positions of a line, found 64 and 48"),
        ({"batch_size": 8}, "batch_size: 8 counts samples"),
        ({"augment": "crop"}, "augment: crop is of images; leave --augment out"),
        ({"compile": True}, "compile: True compiles a whole network"),
        ({"embedding_loss": "mse"}, "embedding_loss: mse compares one embedding of each sample"),
        ({"difference_weight": 1.0}, "difference_weight: 1.0 is of noisy images"),
        ({"mixup": 0.2, "labels": None}, "mixup: 0.2 is of images"),
        ({"streaming": True}, "streaming: True is of data"),
        ({"accumulate": 5}, "a batch of 4 lines cannot be cut into 5 parts"),
        ({"pack": 16}, "the longest document has .* tokens, a line 16"),
        ({"student": "zoo:resnet8"}, "has a label for each token, which language models learn from"),
        ({"student": ["lm:x", "zoo:resnet8"]}, "student lm:x: is a language model, and zoo:resnet8 is none"),
    ],
)
def test_what_makes_no_sense_is_refused(
    stories: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(make_config(stories, tmp_path / "run", **changes))


def test_options_of_language_models_are_refused_for_others(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pack: 64 is for language models"):
        train(make_config(stories, tmp_path / "run", student="zoo:resnet8", labels=None))


def test_another_vocabulary_is_refused_by_its_first_id(stories: Path, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "other", "llama", rows=270)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    first = min(vocab["A"], vocab["B"])
    message = f"student .*: expected the vocabulary of the labels .*: id {first} is 'A' and 'B'; give a network with"
    with pytest.raises(MismatchError, match=message):
        train(make_config(stories, tmp_path / "run", student=f"lm:{folder}"))
    with pytest.raises(MismatchError, match=f"model .*: id {first} is 'A' and 'B'"):
        softlabel.evaluate(f"lm:{folder}", f"{stories / 'data.jsonl'}?key=id", stories / "labels", progress=False)


def test_another_token_at_the_beginning_is_refused(stories: Path, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "other", "llama", rows=270)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match=r"expected '<s>' at the beginning of a text.*adds no token; give"):
        train(make_config(stories, tmp_path / "run", student=f"lm:{folder}"))
