"""A report of a store of documents: its figures, its texts, and what it refuses.

N documents, L tokens and P positions of one, C tokens of the vocabulary, K kept ones, M members.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import xxhash
from scipy.special import log_softmax
from tokenizers import decoders, models, pre_tokenizers

import softlabel
from softlabel import open_store, train
from softlabel.cli.main import main
from softlabel.evaluation.evaluate import evaluate
from softlabel.models import build_model
from softlabel.models.from_lm import LanguageModel
from softlabel.report import token_students
from softlabel.report.document_figures import Documents as ShownDocuments
from softlabel.report.document_figures import NextTokenAgreement
from softlabel.report.report import DocumentReport, report_json
from softlabel.store.encodings import Float32, Sampled, TopK
from softlabel.store.manifest import Combine
from softlabel.store.reader import Store
from softlabel.store.writer import Committer
from tests.report import document_reference as reference
from tests.report.test_page import ELEMENTS, Page
from tests.support.commands import run_softlabel
from tests.support.documents import Documents, make_token_run
from tests.support.language_models import find_stories, write_language_model, write_tokenizer
from tests.support.language_runs import compute_answers, make_config, write_documents, write_labels
from tests.support.stores import make_run, write_store

C, K, T = 300, 6, 2.0
LONG_KEY = "a/" * 1500 + "end"
HOSTILE = ["<script>alert(1)</script>", "\u202eevil", "\x1b[2J", "</div></section>", "{{ 7 * 7 }}", '" onclick="x']


def write_topk(run: Any, documents: Documents) -> Documents:
    """The labels of documents cut to their K largest, with the tails at every declared temperature."""
    columns: dict[str, list[list[Any]]] = {"index": [[]], "value": [[]], "tail": [[]]}
    for logits_PC in documents.logits[0]:
        z = logits_PC.astype(np.float64)
        order = np.argsort(-z, axis=1, kind="stable")
        rest = np.take_along_axis(z, order[:, K:], axis=1)
        tails = [np.log(np.exp(rest * T / at).sum(axis=1)) for at in run.encoding.temperatures]
        columns["index"][0].append(order[:, :K].astype("<u2"))
        columns["value"][0].append(np.take_along_axis(z, order[:, :K], axis=1).astype("<f2"))
        columns["tail"][0].append(np.stack(tails, axis=1).astype("<f4"))
    return dataclasses.replace(documents, columns=columns)


def report_on(store: Path | Store, **options: Any) -> tuple[DocumentReport, dict[str, Any]]:
    written = softlabel.write_report(store, **{"out": None, "progress": False, "device": "cpu", **options})
    assert isinstance(written.report, DocumentReport)
    return written.report, json.loads(report_json(written.report))


@pytest.mark.parametrize("case", ["all", "masked", "topk", "members"])
def test_figures_are_those_of_the_files(tmp_path: Path, case: str) -> None:
    changes: dict[str, Any] = {"positions": "masked"} if case == "masked" else {}
    decode, kept = reference.decode_float16(C, 1, T), None
    if case == "topk":
        changes["encoding"] = TopK(k=K, temperatures=(1.0, T))
        decode = reference.decode_topk(C, K, (1.0, T), T)
    elif case == "members":
        member = make_token_run(classes=C).members[0]
        changes |= {"members": (member, member), "combine": Combine(rule="keep", weights=(1.0, 1.0))}
        decode = reference.decode_float16(C, 2, T)
    run, store = make_token_run(classes=C, **changes), tmp_path / "labels"
    documents = Documents.of(run)
    if case == "topk":
        documents = write_topk(run, documents)
    if case == "members":
        rng = np.random.default_rng(3)
        both = [np.stack([one, one + rng.normal(0, 1, one.shape)], axis=1) for one in documents.logits[0]]
        both = [one - one.max(axis=2, keepdims=True) for one in both]
        documents = dataclasses.replace(
            documents, columns={"logits": [[one.reshape(len(one), -1).astype("<f2") for one in both]]}
        )
    write_store(store, run, documents, bad=(3,))
    raw = reference.read_documents(store, masked=case == "masked")
    positions = list(reference.list_positions(raw, decode, 1.0))
    expected = reference.summarize(positions)
    report, found = report_on(store)

    agreement = found["agreement"]
    assert agreement["predicted"] == expected["predicted"]
    assert agreement["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert agreement["perplexity"] == pytest.approx(math.exp(expected["nll"]), rel=1e-4)
    shares = [count / expected["predicted"] for count, _, _ in expected["by_token"].values()]
    assert agreement["frequency_nll"] == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert agreement["accuracy"] == pytest.approx(expected["accuracy"])
    ranges = {one["first"]: (one["positions"], one["nll"], one["accuracy"]) for one in agreement["by_context"]}
    assert ranges.keys() == expected["by_context"].keys()
    for first, values in ranges.items():
        assert values == pytest.approx(expected["by_context"][first], rel=1e-5)
    by_token = expected["by_token"]
    total = sum(count * nll for count, nll, _ in by_token.values())
    for one in (*agreement["surprising"], *agreement["costly"]):
        count, nll, accuracy = by_token[one["id"]]
        assert (one["count"], one["nll"], one["accuracy"]) == pytest.approx((count, nll, accuracy), rel=1e-5)
        assert one["share"] == pytest.approx(count * nll / total, rel=1e-5)
    enough = [nll for count, nll, _ in by_token.values() if count >= agreement["least"]]
    assert [one["nll"] for one in agreement["surprising"]] == pytest.approx(sorted(enough)[::-1][:50], rel=1e-5)
    costs = sorted((count * nll for count, nll, _ in by_token.values()), reverse=True)[:50]
    assert [one["nll"] * one["count"] for one in agreement["costly"]] == pytest.approx(costs, rel=1e-5)

    for one in found["sharpness"]["at"]:
        at = one["temperature"]
        counted = [p.log_p for p in reference.list_positions(raw, decode, at) if p.counts]
        nats = np.array([reference.entropy(log_p) for log_p in counted])
        assert sum(one["entropy"]["counts"]) == len(counted)
        assert one["mean_entropy"] == pytest.approx(nats.mean(), rel=1e-5)
        assert one["effective_classes"] == pytest.approx(np.exp(nats).mean(), rel=1e-5)
        assert one["one_hot"] == pytest.approx(np.mean([np.exp(log_p.max()) > 0.999 for log_p in counted]))
    assert [one["temperature"] for one in found["sharpness"]["at"]] == [1.0, T]

    kept = {one["temperature"]: one for one in found["encoding"]["kept"]}
    assert set(kept) == ({1.0, T} if case == "topk" else set())
    for at, one in kept.items():
        masses = [np.exp(np.sort(p.log_p)[-K:]).sum() for p in reference.list_positions(raw, decode, at) if p.counts]
        assert one["mean"] == pytest.approx(np.mean(masses), rel=1e-5)
        assert one["lowest"] == pytest.approx(min(masses), rel=1e-5)
    if case == "members":
        information = [p.information for p in positions if p.counts]
        assert found["ensemble"]["rows"] == len(information)
        assert found["ensemble"]["mean_disagreement"] == pytest.approx(np.mean(information), rel=1e-4)

    coverage = found["coverage"]
    assert (coverage["samples"], coverage["documents"], coverage["bad_count"], coverage["empty"]) == (50, 49, 1, 0)
    assert coverage["tokens"] == sum(len(one.ids) for one in raw)
    assert (coverage["positions"], coverage["counted"]) == (len(positions), sum(p.counts for p in positions))
    assert coverage["at_limit"] == sum(len(one.ids) == 23 for one in raw)
    assert sum(one["documents"] for one in coverage["lengths"]) == 49
    used = np.bincount(np.concatenate([one.ids for one in raw]), minlength=C)
    tops = np.bincount([p.log_p.argmax() for p in positions if p.counts], minlength=C)
    assert (found["vocabulary"]["used"], found["vocabulary"]["size"]) == ((used > 0).sum(), C)
    for one in found["vocabulary"]["frequent"]:
        assert (one["count"], one["predicted"]) == (used[one["id"]], tops[one["id"]])
    share, few = found["vocabulary"]["covering"][0]
    assert np.sort(used)[::-1][:few].sum() >= share * used.sum() > np.sort(used)[::-1][: few - 1].sum()

    shown = report.documents
    assert isinstance(shown, ShownDocuments)
    names = [one.name for one in shown.measures]
    assert names == ["entropy", "surprise", *(["disagreement"] if case == "members" else [])]
    order = sorted(expected["by_document"].items(), key=lambda one: (-one[1][1], one[0]))
    assert [one.key for one in shown.lists[0].documents] == [raw[row].key for row, _ in order[:12]]
    for one, (row, (_, nll, _)) in zip(shown.lists[0].documents, order, strict=False):
        assert one.score == pytest.approx(nll, rel=1e-5)
        values: list[list[float | None]] = [[None] * len(raw[row].ids) for _ in names]
        for p in positions:
            if p.row == row and p.counts and p.next >= 0:
                told = (reference.entropy(p.log_p), -p.log_p[p.next], p.information)
                for place in range(len(names)):
                    values[place][p.place + 1] = told[place]
        for mine, theirs in zip(one.values, values, strict=True):
            assert [value is None for value in mine] == [value is None for value in theirs]
            known = [value for value in mine if value is not None]
            assert known == pytest.approx([value for value in theirs if value is not None], rel=1e-3, abs=1e-4)


def test_members_that_name_some_tokens_each(tmp_path: Path) -> None:
    (member,) = make_token_run(classes=C).members
    run = make_token_run(
        classes=C,
        encoding=TopK(k=K, temperatures=(1.0, T)),
        members=(member, member),
        combine=Combine(rule="keep", weights=(1.0, 1.0)),
    )
    documents = Documents.of(run)
    others = [np.random.default_rng(row).permuted(one, axis=1) for row, one in enumerate(documents.logits[0])]
    both = [write_topk(run, one) for one in (documents, dataclasses.replace(documents, logits=[others]))]
    columns: dict[str, Any] = {
        name: [[np.concatenate(pair, axis=1) for pair in zip(*(one.columns[name][0] for one in both), strict=True)]]  # type: ignore[index]
        for name in ("index", "value", "tail")
    }
    write_store(tmp_path / "labels", run, dataclasses.replace(documents, columns=columns))
    decode_one = reference.decode_topk(C, K, (1.0, T), T)

    def decode(cells: dict[str, bytes], at: float) -> Any:
        parts = {name: np.frombuffer(cells[name], kind) for name, kind in reference.OF_TOPK.items()}
        widths = {"index": K, "value": K, "tail": 2}
        halves = [
            {name: one.reshape(-1, 2, widths[name])[:, number].tobytes() for name, one in parts.items()}
            for number in range(2)
        ]
        return np.concatenate([decode_one(half, at) for half in halves])

    raw = reference.read_documents(tmp_path / "labels", masked=False)
    expected = reference.summarize(list(reference.list_positions(raw, decode, 1.0)))
    report, found = report_on(tmp_path / "labels", out=tmp_path / "page.html", fail_if=["kept_mass<0.9"])
    assert found["agreement"]["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert "The mean of the probabilities of the 2 members gives the next token" in report.summary[0].text
    assert "nats by the mean of the members&#39; probabilities" in (tmp_path / "page.html").read_text()
    for one in found["encoding"]["kept"]:
        masses = [
            np.exp(np.sort(log_softmax(decode(document.cells, one["temperature"]), axis=2), axis=2)[..., -K:]).sum(2)
            for document in raw
        ]
        counted = np.concatenate([mass.mean(axis=0)[d.counts] for mass, d in zip(masses, raw, strict=True)])
        assert (one["mean"], one["lowest"]) == pytest.approx((counted.mean(), counted.min()), rel=1e-5)
        assert one["below_90"] == pytest.approx((counted < 0.9).mean())
    assert [one["temperature"] for one in found["encoding"]["kept"]] == [1.0, T]
    index = [part.reshape(-1, 2 * K) for part in columns["index"][0]]
    named = [
        d.ids[place + 1] in row
        for d, part in zip(raw, index, strict=True)
        for place, row in zip(d.place, part, strict=True)
        if d.counts[place] and place + 1 < len(d.ids)
    ]
    assert found["agreement"]["named"] == pytest.approx(np.mean(named))


def test_a_token_that_the_labels_rule_out_is_the_most_surprising_one(tmp_path: Path) -> None:
    run, store = make_token_run(classes=C, temperature=1.0), tmp_path / "labels"
    documents = Documents.of(run)
    place = next(n for n, ids in enumerate(documents.ids) if len(ids) > 4)
    logits = [one.astype("<f2") for one in documents.logits[0]]
    token = int(documents.ids[place][3])
    logits[place][2, token] = -np.inf
    logits[place][2] -= logits[place][2].max()
    write_store(store, run, dataclasses.replace(documents, columns={"logits": [logits]}))
    report, found = report_on(store, out=tmp_path / "report.html")
    assert found["agreement"]["ruled_out"] == 1
    assert report.summary[0].level == "act"
    assert "the next token ∞ nats (perplexity ∞)" in report.summary[0].text
    first = report.documents.lists[0].documents[0]  # type: ignore[union-attr]
    assert math.isinf(first.score)
    assert "Infinity" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("members", [1, 2])
def test_what_is_almost_ruled_out_has_its_nats(tmp_path: Path, members: int) -> None:
    member = make_token_run(classes=C).members[0]
    combine = Combine(rule="keep", weights=(1 / members,) * members)
    kept = {"members": (member,) * members, "combine": combine} if members > 1 else {}
    run, store = make_token_run(classes=C, temperature=1.0, encoding=Float32(), **kept), tmp_path / "labels"
    documents = Documents.of(run)
    logits = []
    for ids in documents.ids:
        one = np.full((len(ids), members, C), -200.0, np.float32)
        one[:, :, 0] = 0.0
        logits.append(one.reshape(len(ids), -1))
    write_store(store, run, dataclasses.replace(documents, columns={"logits": [logits]}))
    _, found = report_on(store)
    pairs = zip(documents.ids, documents.masks, strict=True)
    following = np.concatenate([ids[1:][mask[:-1] == 1] for ids, mask in pairs])
    assert found["agreement"]["ruled_out"] == 0
    assert found["agreement"]["nll"] == pytest.approx(200 * np.mean(following != 0), rel=1e-6)


def test_generate_and_report_judge_kept_members_by_one_rule(folder: Path, tmp_path: Path) -> None:
    given = ("--data", f"{folder}/data.jsonl?key=id", "--teacher", f"lm:{folder}/teacher", "--max-length", 48)
    given = (*given, "--teacher", f"run:{folder}/runs/two", "--combine", "keep", "--temperature", 1, "--no-preflight")
    done = run_softlabel("generate", *given, "--out", "labels", "--device", "cpu", cwd=tmp_path)
    accuracy = report_on(tmp_path / "labels")[1]["agreement"]["accuracy"]
    assert f"accuracy of next tokens, by the mean of the members' probabilities: {accuracy:.4f}" in done.stdout


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    found = []
    for format in ("parquet", "hdf5"):
        run = make_token_run(format, classes=C, positions="masked")
        write_store(tmp_path / format, run, Documents.of(run), bad=(3,))
        found.append(report_on(tmp_path / format)[0])
    for name in ("agreement", "sharpness", "coverage", "vocabulary", "documents"):
        assert getattr(found[0], name) == getattr(found[1], name)


def hash_all(ids: list[Any]) -> Any:
    return np.array([xxhash.xxh3_64_intdigest(one.astype("<i4").tobytes()) for one in ids], np.uint64)


def write_hostile(root: Path) -> list[Any]:
    """A store whose tokenizer has tokens that try to leave their place; returns the ids of its documents."""
    folder = write_tokenizer(root.parent / "tokenizer", added=HOSTILE)
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = loaded.get_vocab_size()
    run = make_token_run(classes=size, samples=6)
    documents = Documents.of(run)
    hostile = [loaded.token_to_id(one) for one in HOSTILE]
    byte = loaded.encode("é\n", add_special_tokens=False).ids
    ids = [np.array([1, *hostile, *byte], "<i4"), *documents.ids[1:]]
    ids[2] = ids[3] = ids[0]
    rng = np.random.default_rng(0)
    logits = [rng.normal(0, 3, (len(one), size)).astype(np.float32) for one in ids]
    logits = [one - one.max(axis=1, keepdims=True) for one in logits]
    documents = dataclasses.replace(
        documents,
        ids=ids,
        masks=[np.ones(len(one), np.uint8) for one in ids],
        logits=[logits],
        keys=[LONG_KEY if number == 1 else f"{HOSTILE[number % len(HOSTILE)]}{number}" for number in range(6)],
        content=hash_all(ids),
    )
    write_store(root, run, documents, bad=(4,), fidelity=None)
    with Committer.open(root, run, {"device": "cpu"}) as committer:
        committer.add_extra("tokenizer", (folder / "tokenizer.json").read_bytes(), "json")
    return ids


def test_tokens_of_strangers_are_text(tmp_path: Path) -> None:
    ids = write_hostile(tmp_path / "labels")
    pages = []
    for name in ("one.html", "two.html"):
        softlabel.write_report(tmp_path / "labels", out=tmp_path / name, progress=False)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    text = pages[0].decode()
    page = Page(text)
    assert {tag for tag, _, _ in page.elements} <= ELEMENTS | {"fieldset", "legend"}
    assert len(page.find("script")) == 2
    assert all(not name.startswith("on") for _, attributes, _ in page.elements for name in attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    ((_, embedded),) = page.find("script", id="figures")
    found = json.loads(embedded)
    assert found["coverage"]["duplicates"]["groups"] == 1
    assert found["coverage"]["duplicates"]["keys"] == [[f"{HOSTILE[n % len(HOSTILE)]}{n}" for n in (0, 2, 3)]]
    assert found["vocabulary"]["unknown"] == sum(int((one == 0).sum()) for n, one in enumerate(ids) if n != 4)
    whole = next(one for one in found["documents"]["lists"][0]["documents"] if one["key"] == f"{HOSTILE[0]}0")
    assert whole["tokens"] == ["<s>", *HOSTILE, "", "é", "\n"]
    assert {len(inner) for attributes, inner in page.find("bdi", title=LONG_KEY)} == {120}
    assert all(len(one["text"]) < 500 for one in found["summary"])
    shown = [inner for attributes, inner in page.find("div", **{"class": "tokens"}) if HOSTILE[0] in inner]
    assert HOSTILE[4] in shown[0]
    assert "\ufffdevil" in shown[0]


def test_characters_of_several_tokens_are_whole(tmp_path: Path) -> None:
    """Of a tokenizer that falls back on bytes, whose decoder spoils all bytes in a row if some are of half a character;
    the last document ends within one."""
    vocab = {name: number for number, name in enumerate(["<unk>", *(f"<0x{one:02X}>" for one in range(256)), "▁", "a"])}
    built = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    texts = ["日本語のテキストは読めますか。中文也一样", "a été a 😀😀😀😀 é\ufffda", "aa 日本語のテキスト日本"]
    ids = [np.array(built.encode(text).ids, "<i4") for text in texts]
    ids[-1] = ids[-1][:-1]
    run = make_token_run(classes=len(vocab), samples=3)
    assert run.tokens is not None
    run = dataclasses.replace(run, tokens=dataclasses.replace(run.tokens, max_length=64))
    rng = np.random.default_rng(0)
    logits = [rng.normal(0, 3, (len(one), len(vocab))).astype(np.float32) for one in ids]
    masks = [np.ones(len(one), np.uint8) for one in ids]
    logits = [one - one.max(axis=1, keepdims=True) for one in logits]
    documents = dataclasses.replace(
        Documents.of(run), ids=ids, masks=masks, logits=[logits], content=hash_all(ids), keys=["0", "1", "2"]
    )
    write_store(tmp_path / "labels", run, documents, fidelity=None)
    with Committer.open(tmp_path / "labels", run, {"device": "cpu"}) as committer:
        committer.add_extra("tokenizer", built.to_str().encode(), "json")
    shown = {one.key: one.tokens for one in report_on(tmp_path / "labels")[0].documents.lists[0].documents}  # type: ignore[union-attr]
    assert [len(shown[str(number)]) for number in range(3)] == [len(one) for one in ids]
    assert ["".join(shown[str(number)]) for number in range(2)] == texts[:2]
    assert shown["0"][:6] == ("", "", "日", "", "", "本")
    assert "".join(shown["2"]).rstrip("\ufffd") == texts[2][:-1]


@pytest.mark.parametrize("case", ["one", "short", "bad", "drawn", "broken"])
def test_stores_with_little_to_say_make_a_page(tmp_path: Path, case: str) -> None:
    samples = 1 if case == "one" else 4
    encoding = {"encoding": Sampled(samples=4, draw="systematic")} if case == "drawn" else {}
    run, store = make_token_run(classes=C, samples=samples, **encoding), tmp_path / "labels"
    documents = Documents.of(run, shortest=3)
    if case == "short":
        documents = dataclasses.replace(
            documents,
            ids=(first := [one[:1] for one in documents.ids]),
            content=hash_all(first),
            masks=[np.ones(1, np.uint8)] * samples,
            logits=[[one[:1] for one in documents.logits[0]]],
        )
    if case == "one":
        documents.masks[0][:] = 1
    if case == "broken":
        documents.logits[0][1][0, 5] = np.nan
    if case == "drawn":
        rng = np.random.default_rng(0)
        drawn = [rng.integers(0, C, (len(one), 4)).astype("<u2") for one in documents.ids]
        weights = [np.full((len(one), 4), 0.25, "<f4") for one in documents.ids]
        documents = dataclasses.replace(documents, columns={"index": [drawn], "weight": [weights]})
    write_store(store, run, documents, bad=range(samples) if case == "bad" else (), fidelity=None)
    with open_store(store, verify="sizes") as opened:
        report, found = report_on(opened, out=tmp_path / "page.html")
    assert len(report.summary) == 6
    Page((tmp_path / "page.html").read_text())
    absent = {name for name, section in found.items() if isinstance(section, dict) and set(section) == {"reason"}}
    unmeasured = {"agreement", "sharpness", "documents", "ensemble", "students"}
    assert (
        absent
        == {
            "one": {"ensemble", "students"},
            "short": unmeasured - {"sharpness"},
            "bad": unmeasured,
            "drawn": unmeasured,
            "broken": unmeasured,
        }[case]
    )
    assert found["coverage"]["non_finite"] == (case == "broken")
    assert found["coverage"]["documents"] == (0 if case == "bad" else samples)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--noise-csv", "noise.csv"), "--noise-csv: documents have no hard labels"),
        (("--fail-if", "noise>0.1"), "noise is of samples with one answer each; of documents expected one of accuracy"),
        (("--fail-if", "kept_mass<0.9"), "kept_mass was not measured: only labels of encoding topk leave out a part"),
        (("--fail-if", "student_nll>1"), "student_nll was not measured"),
        (("--eval-data", "labels"), "--runs"),
        (("--data", "other.jsonl?key=id"), "found other documents"),
        (("--data", "changed.jsonl?key=id"), "is not the one that was labelled"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_documents_do_not_have_is_refused_by_name(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, prefix, word in (("other", "else", "the"), ("changed", "doc", "birds birds")):
        lines = [json.dumps({"id": f"{prefix}-{number:03d}", "text": word}) for number in range(40)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    assert main(["report", str(folder / "labels"), *options, "--out", "page.html"]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not Path("page.html").exists()


def test_metrics_of_documents_are_refused_for_other_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_store(Path("labels"), make_run())
    assert main(["report", "labels", "--fail-if", "perplexity>3"]) == 2
    assert "perplexity is of documents; of samples with one answer each expected one of" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, 40 documents and their labels at T = 2, held-out ones with theirs, and two students (runs/...)."""
    folder = tmp_path_factory.mktemp("documents")
    write_language_model(folder / "teacher", "llama", num_key_value_heads=2)
    for name, seed in (("data", 0), ("test", 1)):
        texts = write_documents(folder / f"{name}.jsonl", seed=seed)
        write_labels(folder / ("labels" if name == "data" else "test-labels"), folder / "teacher", texts)
    for name, epochs in (("one", 1), ("two", 2)):
        train(make_config(folder, folder / "runs" / name, epochs=epochs))
    return folder


def test_students_are_measured_as_evaluate_does_and_shown_where_they_are_furthest(folder: Path) -> None:
    options = {"eval_data": f"{folder}/test.jsonl?key=id", "eval_labels": folder / "test-labels"}
    report, found = report_on(folder / "labels", data=f"{folder}/data.jsonl?key=id", runs=[folder / "runs"], **options)
    comparisons = found["students"]["comparisons"]
    assert [Path(one["run"]).name for one in comparisons] == ["one", "one", "two", "two"]
    for one in comparisons:
        held_out = one["of_eval_data"]
        data, labels = ("test", "test-labels") if held_out else ("data", "labels")
        asked = evaluate(Path(one["run"]), f"{folder}/{data}.jsonl?key=id", folder / labels, device="cpu")
        names = ("accuracy", "perplexity", "calibration_error", "agreement", "teacher_accuracy", "temperature")
        for name in names:
            assert one[name] == pytest.approx(getattr(asked, name), rel=1e-6)
        assert (one["nll"], one["divergence"]) == pytest.approx((asked.cross_entropy, asked.teacher_kl), rel=1e-6)
        assert (one["samples"], one["of"], one["held_out"]) == (40, 40, held_out)
        assert one["divergence_kind"] == "exact"
    # The divergence of each document, from the logits of both by themselves.
    with open_store(folder / "labels") as store:
        rows = store.take(range(40))
    ends = np.cumsum(rows.lengths)
    ids = np.split(rows.columns["tokens"].reshape(-1).astype("<i4"), ends[:-1])
    teacher = np.split(rows.scaled_logits.astype(np.float64), ends[:-1])
    student = build_model(f"run:{folder}/runs/one")
    assert isinstance(student, LanguageModel)
    nats = []
    for scaled_PC, logits_PC in zip(teacher, compute_answers(student, ids), strict=True):
        log_p, log_q = log_softmax(scaled_PC, axis=1), log_softmax(logits_PC / T, axis=1)
        nats.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1)[:-1])  # nothing follows the last position
    assert isinstance(report.documents, ShownDocuments)
    names = [one.name for one in report.documents.measures]
    runs = [f"KL(teacher || {folder}/runs/{name})" for name in ("one", "two")]
    assert names == ["entropy", "surprise", *runs]
    shown = report.documents.lists[1].documents
    order = sorted(range(40), key=lambda row: -nats[row].mean())[: len(shown)]
    assert [one.key for one in shown] == [rows.keys[row] for row in order]
    for one, row in zip(shown, order, strict=True):
        assert one.score == pytest.approx(nats[row].mean(), rel=1e-4)
        assert one.values[2][0] is None
        assert list(one.values[2][1:]) == pytest.approx(nats[row], rel=2e-3, abs=1e-5)
        assert None not in one.values[3][1:]
    assert found["summary"][-1]["text"].startswith("The best of 2 students, ")


def test_students_of_large_stores_are_measured_on_some_of_the_documents(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_students, "MOST_POSITIONS", 200)
    report, found = report_on(folder / "labels", runs=str(folder / "runs" / "one"))
    (one,) = found["students"]["comparisons"]
    assert 5 <= one["samples"] < one["of"] == 40
    assert one["tokens"] < 400
    assert isinstance(report.documents, ShownDocuments)
    assert [len(part.documents) for part in report.documents.lists] == [12, 6]
    # Every document that is shown has the student's numbers, measured among those or not.
    assert all(None not in text.values[2][1:] for part in report.documents.lists for text in part.documents)


def test_runs_of_language_models_alone_and_beside_their_store(folder: Path) -> None:
    given = ("report", "runs", "--eval-data", "test.jsonl?key=id", "--json", "alone.json", "--out", "alone.html")
    done = run_softlabel(*given, "--device", "cpu", "--fail-if", "student_nll>0", cwd=folder, code=3)
    found = json.loads((folder / "alone.json").read_text())
    assert [one["with_teacher"] for one in found["students"]["comparisons"]] == [0, 0]
    assert found["agreement"].keys() == {"reason"}
    assert "best of 2 students" in done.stdout
    assert "texts of 0 documents" in done.stdout
    Page((folder / "alone.html").read_text())


def test_documents_that_were_cut_at_another_length_are_compared_by_key(folder: Path, tmp_path: Path) -> None:
    most = 20
    encode = tokenizers.Tokenizer.from_file(str(folder / "teacher" / "tokenizer.json")).encode
    texts = {
        name: [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("data", "test")
    }
    for name, teacher in (("data", f"run:{folder}/runs/one"), ("test", f"lm:{folder}/teacher")):
        given = {"max_length": most, "preflight": False, "device": "cpu", "progress": False}
        softlabel.generate(f"{folder}/{name}.jsonl?key=id", teachers=[teacher], out=tmp_path / name, **given)
    lengths = {name: [len(encode(text).ids) for text in found] for name, found in texts.items()}
    cut = sum(length > most for length in lengths["data"])
    assert 5 < cut < 35

    # The teacher was trained on them with 48 tokens.
    about = report_on(tmp_path / "data")[1]["about"]
    assert (about["seen"], about["seen_samples"]) == ("in-sample", 40)
    # Other documents under the same keys: those that are whole in both are known to be others.
    pairs = list(zip(texts["test"], lengths["test"], strict=True))
    same = sum(length <= most and text in texts["data"] for text, length in pairs)
    unknown = sum(length > most or (length == most and text not in texts["data"]) for text, length in pairs)
    for name, trained, by_keys in (("data", 40, cut), ("test", same + unknown, unknown)):
        options = {"eval_data": f"{folder}/{name}.jsonl?key=id", "eval_labels": tmp_path / name}
        found = report_on(folder / "labels", runs=[folder / "runs" / "one"], **options)[1]
        (one,) = [one for one in found["students"]["comparisons"] if one["of_eval_data"]]
        assert (one["held_out"], one["trained_on"], one["by_keys"]) == (False, trained, by_keys)


def test_stories_are_shown_as_they_were_written(tmp_path: Path) -> None:
    stories = find_stories()
    data = f"{stories}/test.jsonl?key=id&rows=0:6"
    given = ("--data", data, "--teacher", f"lm:{stories}", "--max-length", 300, "--encoding", "topk", "--top-k", 16)
    run_softlabel("generate", *given, "--temperature", 1, "--out", "labels", "--device", "cpu", cwd=tmp_path)
    report, _ = report_on(tmp_path / "labels", data=data)
    assert isinstance(report.agreement, NextTokenAgreement)
    assert report.agreement.nll < 2
    assert report.documents.note == ""  # type: ignore[union-attr]
    texts = {one["id"]: one["text"] for one in map(json.loads, (stories / "test.jsonl").read_text().splitlines())}
    for one in report.documents.lists[0].documents:  # type: ignore[union-attr]
        shown = "".join(one.tokens).removeprefix("<s>").strip()
        assert shown
        assert shown in texts[one.key]
