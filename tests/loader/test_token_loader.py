"""Batches of documents: the labels that the store has for each position, whatever the packing, ranks or shuffle."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import softlabel
from softlabel.dataset.source import Source
from softlabel.errors import MismatchError, MissingKeyError, UsageError
from softlabel.inputs.base import Sample, TokenIds
from softlabel.inputs.tokens import TOKENS
from softlabel.loader.token_batch import TokenBatch
from softlabel.loader.token_loader import TokenLoader
from tests.support.documents import Documents, make_token_run
from tests.support.stores import write_store


class DocumentSource(Source):
    """The documents of a store, in another order."""

    kind, name, inputs, has_labels, class_names = "json", "documents", TOKENS, False, None

    def __init__(self, documents: Documents, order: Sequence[int]) -> None:
        self._all, self._order = documents, list(order)
        self.lengths = np.array([len(documents.ids[number]) for number in self._order], np.int32)

    def __len__(self) -> int:
        return len(self._order)

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return [self._all.keys[number] for number in self._order[start:stop]]

    def labels(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.full(len(self._order[start:stop]), -100)

    def read(self, indices: Sequence[int]) -> list[Sample]:
        numbers = [self._order[index] for index in indices]
        return [
            Sample(key=self._all.keys[number], raw=TokenIds(ids=self._all.ids[number], mask=self._all.masks[number]))
            for number in numbers
        ]


@pytest.fixture
def documents() -> Documents:
    return Documents.of(make_token_run(samples=40), seed=3)


def check(batch: TokenBatch, documents: Documents, *, labelled: set[str] | None = None) -> list[str]:
    """Compare every position of a batch with the documents; returns the keys."""
    number = {key: place for place, key in enumerate(documents.keys)}
    keys, places = iter(batch.keys), iter(range(len(batch.places)))
    for row in range(len(batch)):
        segments = batch.segments[row].numpy()
        assert sorted(set(segments) - {0}) == list(range(1, segments.max(initial=0) + 1))
        assert (batch.weight[row][segments == 0] == 0).all()
        for segment in range(1, segments.max(initial=0) + 1):
            here, one = np.flatnonzero(segments == segment), number[key := next(keys)]
            ids, mask, logits = documents.ids[one], documents.masks[one], documents.logits[0][one]
            assert batch.tokens[row, here].tolist() == ids.tolist()
            assert batch.position_ids[row, here].tolist() == list(range(len(ids)))
            assert batch.weight[row, here].tolist() == mask.tolist()
            following = [*ids[1:], -100]
            assert batch.labels[row, here].tolist() == [
                token if count else -100 for token, count in zip(following, mask, strict=True)
            ]
            for place in np.flatnonzero(mask):
                at = next(places)
                assert batch.places[at] == row * batch.tokens.shape[1] + here[place]
                has = labelled is None or key in labelled
                assert has == (batch.has_target is None or bool(batch.has_target[at]))
                if has and batch.target is not None:
                    expected = torch.from_numpy(logits[place].astype(np.float16))
                    assert torch.equal(batch.target.scaled_logits[at], expected)  # type: ignore[attr-defined]
    assert next(places, None) is None
    assert torch.equal(batch.at_places(batch.labels), batch.hard_labels)
    return list(batch.keys)


@pytest.mark.parametrize("options", [{"pack": 64}, {"pad": 23}, {"pack": 64, "workers": 2}])
@pytest.mark.parametrize("positions", ["all", "masked"])
def test_every_position_gets_its_own_label(tmp_path: Path, options: dict[str, int], positions: str) -> None:
    run = make_token_run(samples=40, positions=positions)
    everything = Documents.of(run, seed=3)
    # The labels of all positions, to be compared with; the store has those that it is to have.
    write_store(tmp_path / "labels", run, everything)
    if positions == "masked":
        whole = [np.zeros((len(ids), run.num_classes), np.float32) for ids in everything.ids]
        for one, mask, labels in zip(whole, everything.masks, everything.logits[0], strict=True):
            one[mask != 0] = labels
        everything = replace(everything, logits=[whole])
    order = np.random.default_rng(0).permutation(40).tolist()
    loader = TokenLoader(DocumentSource(everything, order), tmp_path / "labels", batch_tokens=256, **options)  # type: ignore[arg-type]
    epochs = [[check(batch, everything) for batch in loader] for _ in range(2)]
    loader.close()
    for batches in epochs:
        assert sorted(key for keys in batches for key in keys) == sorted(everything.keys)
    assert epochs[0] != epochs[1]


def test_ranks_and_resuming_give_the_same_lines(tmp_path: Path, documents: Documents) -> None:
    write_store(tmp_path / "labels", documents.run, documents)
    source = DocumentSource(documents, range(40))

    def make(**options: int) -> TokenLoader:
        return TokenLoader(source, tmp_path / "labels", batch_tokens=192, pack=32, tail="pad", **options)  # type: ignore[arg-type]

    alone = [check(batch, documents) for batch in make()]
    ranks = [make(rank=rank, world_size=2) for rank in range(2)]
    shares = [[check(batch, documents) for batch in rank] for rank in ranks]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone
    begun = make()
    steps = iter(begun)
    found = [list(next(steps).keys) for _ in range(2)]
    later = make(workers=1)
    later.load_state_dict(begun.state_dict())
    found += [list(batch.keys) for batch in later]
    assert found == alone
    assert len(make()) == len(alone)
    later.close()


def test_positions_see_their_own_document_alone(documents: Documents) -> None:
    (batch, *_) = TokenLoader(DocumentSource(documents, range(40)), batch_tokens=64, pack=64)
    sees = batch.attention_mask[0, 0].numpy()
    segments = batch.segments[0].numpy()
    for place, segment in enumerate(segments):
        expected = [segments[other] == segment and other <= place for other in range(len(segments))]
        assert sees[place].tolist() == expected


def test_documents_without_a_row(tmp_path: Path, documents: Documents) -> None:
    bad = 7
    write_store(tmp_path / "labels", documents.run, documents, bad=[bad])
    more = Documents.of(make_token_run(samples=44), seed=3)
    same = {name: [*getattr(documents, name), *getattr(more, name)[40:]] for name in ("keys", "ids", "masks")}
    both = Documents(run=more.run, content=more.content, logits=[[*documents.logits[0], *more.logits[0][40:]]], **same)  # type: ignore[arg-type]
    source = DocumentSource(both, range(44))
    with pytest.raises(MissingKeyError, match="4 of 44 samples have no row"):
        TokenLoader(source, tmp_path / "labels", pack=64)
    loader = TokenLoader(source, tmp_path / "labels", pack=64, batch_tokens=128, missing="hard-only")
    assert (loader.dataset.skipped_bad, loader.dataset.skipped_missing) == (1, 0)
    keys = [key for batch in loader for key in check(batch, both, labelled=set(documents.keys))]
    assert sorted(keys) == sorted(key for number, key in enumerate(both.keys) if number != bad)
    skipping = TokenLoader(source, tmp_path / "labels", pack=64, batch_tokens=128, missing="skip")
    assert sum(len(batch.keys) for batch in skipping) == 39
    assert skipping.dataset.skipped_missing == 4


def test_a_changed_token_is_refused_by_key(tmp_path: Path, documents: Documents) -> None:
    write_store(tmp_path / "labels", documents.run, documents)
    documents.ids[11][0] += 1
    with pytest.raises(MismatchError, match=f"sample {documents.keys[11]!r} is not the one that was labelled"):
        list(TokenLoader(DocumentSource(documents, range(40)), tmp_path / "labels", pack=64))


def test_wrong_numbers_are_refused(documents: Documents) -> None:
    source = DocumentSource(documents, range(40))
    for options, message in (
        ({}, "pack and pad: expected one of them"),
        ({"pack": 64, "pad": 64}, "pack and pad: expected one of them"),
        ({"pack": 16}, "the longest document has 22 tokens, a line 16"),
        ({"pad": 16}, "give --pad 22 or more"),
        ({"pack": 64, "batch_tokens": 63}, "batch_tokens: expected at least a line of 64"),
        ({"pack": 64, "batch_tokens": 64, "world_size": 2, "tail": "drop"}, "for each of 2 ranks"),
    ):
        with pytest.raises(UsageError, match=message):
            TokenLoader(source, **options)  # type: ignore[arg-type]


def test_loaders_of_whole_samples_refuse_labels_of_positions(tmp_path: Path, documents: Documents) -> None:
    write_store(tmp_path / "labels", documents.run, documents)
    for join in (
        lambda: softlabel.SoftLabelLoader("digits?rows=0:40", tmp_path / "labels"),
        lambda: softlabel.LabelJoin(tmp_path / "labels"),
    ):
        with pytest.raises(MismatchError, match="has a label for every position of a document"):
            join()


def test_a_batch_in_which_no_position_has_a_label(tmp_path: Path) -> None:
    """The first document of the store has no labelled position, and the only other one has no row."""
    run = make_token_run(samples=1, positions="masked")
    first = Documents.of(run, seed=3)
    first.masks[0][:] = 0
    bare = replace(first, logits=[[np.zeros((0, run.num_classes), np.float32)]])
    write_store(tmp_path / "labels", run, bare)
    both = Documents.of(make_token_run(samples=2), seed=3)
    both = replace(both, ids=[first.ids[0], both.ids[1]], masks=[first.masks[0], np.ones_like(both.ids[1], np.uint8)])
    loader = TokenLoader(DocumentSource(both, range(2)), tmp_path / "labels", pack=64, missing="hard-only")
    (batch,) = loader
    assert len(batch.places) == len(both.ids[1])
    assert batch.has_target is not None
    assert not batch.has_target.any()
