"""Documents of token ids: their kind, their content hash, and how a network takes them."""

import numpy as np
import pytest
import torch
import xxhash

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import Sample, TokenIds
from softlabel.inputs.batch import collate_samples, decode_samples
from softlabel.inputs.tokens import TOKENS, TokenTransform, count_what_follows
from softlabel.inputs.transforms import transform_of


def document(*ids: int, counted: tuple[int, ...] | None = None) -> Sample:
    mask = np.ones(len(ids), np.uint8) if counted is None else np.array(counted, np.uint8)
    return Sample(key=str(ids), raw=TokenIds(ids=np.array(ids, np.int32), mask=mask))


def transform(max_length: int = 40, vocabulary: int = 1000) -> TokenTransform:
    return TokenTransform(fingerprint="f" * 64, vocabulary=vocabulary, max_length=max_length, pad_id=7)


def test_a_batch_is_padded_to_the_bucket_of_its_longest_document() -> None:
    samples = [document(5), document(*range(9)), document(1, 2, 3, counted=(0, 1, 0))]
    decoded = decode_samples(samples, TOKENS, name="data")
    hashes = [xxhash.xxh3_64_intdigest(np.array(ids, "<i4").tobytes()) for ids in ([5], range(9), [1, 2, 3])]
    assert decoded.content.tolist() == hashes
    assert [TOKENS.content_hash(sample.raw) for sample in samples] == hashes
    (inputs,), failed = collate_samples(
        [decoded.items[place] for place in range(3)], ["a", "b", "c"], [transform()], network="teacher"
    )
    assert not failed
    assert inputs.form == {
        "input_ids": ((40,), torch.int32),
        "attention_mask": ((40,), torch.uint8),
        "mask": ((40,), torch.uint8),
    }
    assert transform().bucket_of(inputs).tolist() == [8, 12, 8]
    cut = transform().finish(transform().cut(inputs)).tensors
    assert cut["input_ids"].tolist()[0] == [5, *[7] * 11]
    assert cut["input_ids"].tolist()[1] == [*range(9), 7, 7, 7]
    assert cut["attention_mask"].sum(dim=1).tolist() == [1, 9, 3]
    assert cut["mask"].sum(dim=1).tolist() == [1, 9, 1]
    assert cut["mask"][2].nonzero().tolist() == [[1]]
    assert cut["input_ids"].dtype == torch.int64


def test_what_follows_a_token_counts_at_its_position() -> None:
    assert count_what_follows(np.array([0, 0, 1, 1, 0])).tolist() == [0, 1, 1, 0, 0]
    assert count_what_follows(np.array([True])).tolist() == [0]


def test_what_is_no_document_is_refused() -> None:
    with pytest.raises(BadImageError, match="empty"):
        TOKENS.decode(document())
    with pytest.raises(DataError, match="expected the token ids of a document, found str"):
        TOKENS.decode(Sample(key="a", raw="a text"))
    for sample, message in ((document(*range(41)), "at most 40 tokens, found 41"), (document(3, 1000), "found 1000")):
        item, _ = TOKENS.decode(sample)
        with pytest.raises(DataError, match=message):
            transform().fit(item)
    with pytest.raises(DataError, match="another kind"):
        transform().fit("a text")
    with pytest.raises(SpecError, match="at least 1 token"):
        transform(0)
    with pytest.raises(SpecError, match="preprocessing: expected tokenizer, vocabulary"):
        transform_of({"kind": "tokens", "tokenizer": "f"})


def test_a_transform_is_restored_from_json() -> None:
    found = transform()
    assert transform_of(found.to_dict()) == found
    assert found.shape != transform(vocabulary=999).shape
    example = found.example(3)
    assert example is not None
    assert example.tensors["attention_mask"].sum(dim=1).tolist() == [1, 2, 3]
