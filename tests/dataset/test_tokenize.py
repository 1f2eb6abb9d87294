"""Documents of tokens out of texts, chats and ids, against the tokenizers of transformers; and their cache."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
import xxhash

from softlabel.dataset import ReorderedSource, Source, TokenizedSource, open_source, tokenize_source
from softlabel.errors import BadImageError, DataError, SoftLabelError, SpecError
from softlabel.inputs.base import TokenIds
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from tests.support.language_models import CHATML, MARKED, find_stories, write_tokenizer

CHATS = [
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "naïve — 日本語"},
        {"role": "assistant", "content": "é cat"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "cat cat"},
    ],
    [{"role": "user", "content": "No answer"}],
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTLABEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    return read_vocabulary(write_tokenizer(tmp_path / "tokenizer", template=MARKED))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents(source: Source) -> list[list[int] | str]:
    """The ids of every document, or why it has none."""
    raws = [sample.raw for sample in source.read(range(len(source)))]
    return [raw.ids.tolist() if isinstance(raw, TokenIds) else str(raw) for raw in raws]


def masks(source: Source) -> list[list[int]]:
    raws = [sample.raw for sample in source.read(range(len(source)))]
    return [raw.mask.tolist() for raw in raws if isinstance(raw, TokenIds)]


def test_real_stories_are_tokenised_as_transformers_does(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = find_stories()
    source = open_source(f"{folder}/test.jsonl?key=id")
    found = tokenize_source(source, read_vocabulary(folder), max_length=290)
    texts = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()]
    expected = transformers.AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    assert documents(found) == [ids[:290] for ids in expected]
    assert found.lengths.dtype == np.int32
    assert found.lengths.tolist() == found.counted.tolist() == [min(290, len(ids)) for ids in expected]
    assert found.keys()[:2] == ["story-05500", "story-05501"]
    longer = [len(ids) - 290 for ids in expected if len(ids) > 290]
    assert (
        f"{len(longer)} of 500 documents are longer than 290 tokens and lose their end, {sum(longer)} tokens in all"
        in (caplog.text)
    )
    assert (found.tokenization.bos, found.tokenization.eos, found.tokenization.max_length) == (1, None, 290)
    assert found.labels().tolist() == [-100] * 500
    tokenize_source(open_source(f"{folder}/test.jsonl?key=id&rows=0:1"), read_vocabulary(folder), max_length=9)
    assert "1 of 1 documents is longer than 9 tokens and loses its end" in caplog.text


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_what_the_assistant_says_counts(tmp_path: Path, template: str) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", template=template)
    found = tokenize_source(
        open_source(write_lines(tmp_path / "t.jsonl", [{"messages": chat} for chat in CHATS])),
        read_vocabulary(folder),
        max_length=1000,
    )
    # The turns of the other template, as transformers marks them.
    mark = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [
        peer.apply_chat_template(
            chat,
            chat_template=template if template == MARKED else mark,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        for chat in CHATS
    ]
    assert documents(found) == [one["input_ids"] for one in expected]
    # A position counts where the token after it is the assistant's.
    assert masks(found) == [[*one["assistant_masks"][1:], 0] for one in expected]
    assert found.counted.tolist() == [sum(one["assistant_masks"]) for one in expected]
    assert found.counted[2] == 0
    assert found.counted[1] > found.counted[0] > 0
    assert (found.tokenization.bos, found.tokenization.template is None) == (None, False)


def test_a_long_document_loses_its_end_and_keeps_what_counts_there(tmp_path: Path, vocabulary: Vocabulary) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"x": [7, 8, 9, 10], "m": [0, 0, 1, 1]}, {"x": [5], "m": [True]}])
    found = tokenize_source(open_source(f"{data}?tokens=x&mask=m"), vocabulary, max_length=2)
    assert documents(found) == [[7, 8], [5]]
    assert masks(found) == [[0, 1], [0]]
    assert (found.truncated, found.counted.tolist()) == (1, [1, 0])


def test_documents_without_a_token_are_bad_and_the_others_are_not(tmp_path: Path, vocabulary: Vocabulary) -> None:
    texts = write_lines(
        tmp_path / "t.jsonl", [{"text": "a", "k": 1}, {"k": 2}, {"text": "", "k": 3}, {"text": "\ud800"}]
    )
    found = tokenize_source(open_source(f"{texts}?text=text&key=index"), vocabulary, max_length=9)
    assert [len(one) if isinstance(one, list) else one[:15] for one in documents(found)] == [
        *(2, "the row has no ", 1, "the row has no ")
    ]
    assert found.lengths.tolist() == [2, 0, 1, 0]
    ids = pa.table({"x": [[3], None, [], [-1], [4, 5], [6]], "m": [[1], [1], [], [1], [1], [2]]})
    pq.write_table(ids, tmp_path / "t.parquet")
    found = tokenize_source(open_source(f"{tmp_path}/t.parquet?tokens=x&mask=m"), vocabulary, max_length=9)
    assert documents(found) == [
        [3],
        "the row has no token ids",
        "the document is empty: it has no position to label",
        "expected token ids from 0, found others",
        "expected a mask of 2 entries, one for each token, found 1",
        "expected a mask of 0 and 1, found another",
    ]
    chats = write_lines(tmp_path / "c.jsonl", [{"messages": CHATS[0]}, {"messages": []}, {"messages": None}])
    found = tokenize_source(open_source(chats), vocabulary, max_length=99)
    assert [isinstance(one, list) for one in documents(found)] == [True, False, False]
    with pytest.raises(BadImageError, match="the row has no "):
        found.inputs.decode(found.read([1])[0])


def test_an_unmarked_text_without_a_token_added_may_be_empty(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    data = write_lines(tmp_path / "t.jsonl", [{"text": ""}, {"text": "a"}])
    found = tokenize_source(open_source(data), read_vocabulary(folder), max_length=9)
    assert found.tokenization.bos is None
    assert found.lengths.tolist() == [0, 1]
    assert documents(found)[0] == "the document is empty: it has no position to label"


def test_documents_are_kept_until_the_data_change(tmp_path: Path, vocabulary: Vocabulary, cache: Path) -> None:
    path = tmp_path / "t.jsonl"

    def tokenise(max_length: int = 9) -> list[list[int] | str]:
        return documents(tokenize_source(open_source(f"{path}?text=text"), vocabulary, max_length=max_length))

    write_lines(path, [{"text": "a cat"}, {"text": "b"}])
    first = tokenise()
    (file,) = cache.glob("*.bin")
    written = file.stat().st_mtime_ns
    assert tokenise() == first
    assert file.stat().st_mtime_ns == written, "it was made again"
    assert (
        pickle.loads(pickle.dumps(tokenize_source(open_source(f"{path}?text=text"), vocabulary, max_length=9)))
        .read([1])[0]
        .raw.ids.tolist()
        == first[1]
    )

    (cache / f"{file.name}.77.ids.tmp").write_bytes(b"of a process that was killed")
    for damage in ("flip", "cut", "empty"):
        content = bytearray(file.read_bytes())
        content[3] ^= 1
        file.write_bytes({"flip": bytes(content), "cut": bytes(content[:-20]), "empty": b""}[damage])
        assert tokenise() == first, damage

    write_lines(path, [{"text": "a cow"}, {"text": "b"}])  # of the same size
    os.utime(path, ns=(1, 1))
    changed = tokenise()
    assert changed[0] != first[0]
    assert changed[1] == first[1]
    assert list(cache.glob("*.bin")) == [file], "what is stale is replaced"
    assert tokenise(2) == [one[:2] for one in changed]
    assert len(list(cache.glob("*.bin"))) == 2
    assert not list(cache.glob("*.tmp"))


class Sentences:
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": self.texts[index]}


def test_data_without_files_are_known_by_their_content(vocabulary: Vocabulary) -> None:
    one = tokenize_source(open_source(Sentences("a", "b")), vocabulary, max_length=9)
    two = tokenize_source(open_source(Sentences("a", "c")), vocabulary, max_length=9)
    assert documents(one)[0] == documents(two)[0]
    assert documents(one)[1] != documents(two)[1]
    wide = [sample.raw for sample in one.read([1])]
    assert isinstance(wide[0], TokenIds)
    assert one.inputs.content_hash(wide[0]) == xxhash.xxh3_64_intdigest(wide[0].ids.astype("<i4").tobytes())


def test_parts_of_documents_know_their_lengths(tmp_path: Path, vocabulary: Vocabulary) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": "a" * number, "id": f"k{number}"} for number in range(9)])
    whole = tokenize_source(open_source(f"{data}?text=text&id=id"), vocabulary, max_length=6)
    assert whole.lengths.tolist() == [1, 2, 3, 4, 5, 6, 6, 6, 6]
    order = np.array([3, 0, 8])
    assert ReorderedSource(whole, order).lengths.tolist() == [4, 1, 6]  # type: ignore[union-attr]
    assert open_source([whole, whole]).lengths.tolist() == [*whole.lengths] * 2  # type: ignore[union-attr]
    assert open_source(whole, ignore_labels=True).lengths.tolist() == whole.lengths.tolist()  # type: ignore[union-attr]
    for options in ("rows=2:5", "fold=1/2"):
        part = tokenize_source(open_source(f"{data}?text=text&id=id&{options}"), vocabulary, max_length=6)
        rows = [int(key[1:]) for key in part.key_table().to_list()]
        assert part.lengths.tolist() == whole.lengths[rows].tolist()
        assert documents(part) == [documents(whole)[row] for row in rows]
    assert open_source(f"{data}?text=text").lengths is None


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
@pytest.mark.parametrize("column", ["messages", "text"])
def test_documents_that_are_found_have_keys_by_id(tmp_path: Path, name: str, column: str) -> None:
    row = {column: CHATS[0] if column == "messages" else "a", "n": "k7"}
    write_lines(tmp_path / "t.jsonl", [row])
    pq.write_table(pa.table({one: [value] for one, value in row.items()}), tmp_path / "t.parquet")
    assert open_source(f"{tmp_path}/{name}?id=n").keys() == ["k7"]
    with pytest.raises(SpecError, match="id= and key= both name the column of the keys"):
        open_source(f"{tmp_path}/{name}?id=n&key=n")
    with pytest.raises(SpecError, match="unknown option id"):
        open_source(f"{tmp_path}/{name}?image=n&id=n")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t.jsonl", "?messages=c&tokens=x", "messages= names chats, tokens= token ids; give one|not an option of"),
        ("t.parquet", "?messages=c&tokens=x", "messages= names chats, tokens= token ids; give one of them"),
        ("t.parquet", "?tokens=x&text=text", "text= names texts, tokens= documents; give one of them"),
        ("t.parquet", "?messages=c&label=n", "label= has no meaning beside messages="),
        ("t.parquet", "?messages=c&classes=names.txt", "classes= has no meaning beside messages="),
        ("t.jsonl", "?messages=c&label=n", "label= is not an option of a table of chats"),
        ("t.jsonl", "?mask=m", "mask= says which tokens count; name the column of the tokens too"),
        ("t.parquet", "?tokens=x&mask=x", "is tokens= and mask="),
        ("t.parquet", "?tokens=c", "expected lists of whole numbers for tokens=, found"),
        ("t.parquet", "?tokens=x&mask=text", "expected lists of whole numbers for mask=, found"),
        ("t.parquet", "?messages=x", "expected lists of messages with role and content for messages=, found"),
        ("t.parquet", "?messages=none", "no column 'none'; the file has"),
        ("t.jsonl", "?messages=x", "line 1: column 'x': expected messages of the form"),
        ("t.jsonl", "?tokens=c", "line 1: column 'c': expected a list of whole numbers, found"),
        ("t.jsonl", "?tokens=m", "expected token ids, found true or false"),
        ("t.jsonl", "?text=text&id=n&key=n", "id= and key= both name the column of the keys"),
        ("t.csv", "?messages=text", "messages= names a column of a .parquet or .jsonl file"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(tmp_path: Path, name: str, options: str, message: str) -> None:
    row = {"text": "a", "c": CHATS[0], "x": [1, 2], "m": [True, False], "n": 3}
    write_lines(tmp_path / "t.jsonl", [row])
    pq.write_table(pa.table({column: [value] for column, value in row.items()}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("text\na\n")
    with pytest.raises(SoftLabelError, match=message):
        open_source(f"{tmp_path}/{name}{options}")


def test_what_cannot_be_tokenised_is_refused(tmp_path: Path, vocabulary: Vocabulary) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": "a", "b": "b", "x": [3, 900], "messages": CHATS[1]}])
    with pytest.raises(SpecError, match="a document is one text, found a pair"):
        tokenize_source(open_source(f"{data}?text=text&text_pair=b"), vocabulary, max_length=9)
    with pytest.raises(DataError, match=r"sample '0': expected token ids below 263, .* found 900"):
        tokenize_source(open_source(f"{data}?tokens=x"), vocabulary, max_length=9)
    with pytest.raises(SpecError, match="at least 1 token, found 0"):
        tokenize_source(open_source(f"{data}?text=text"), vocabulary, max_length=0)
    plain = Vocabulary(vocabulary.tokenizer)
    with pytest.raises(SpecError, match="messages= needs a chat template, found none"):
        tokenize_source(open_source(f"{data}?messages=messages"), plain, max_length=9)
    forgetful = CHATML.replace("message['content']", "(message['content'] if loop.last else '...')")
    folder = write_tokenizer(tmp_path / "forgetful", template=forgetful)
    with pytest.raises(DataError, match=r"sample '0': chat template: expected that the chat up to message 3"):
        tokenize_source(open_source(f"{data}?messages=messages"), read_vocabulary(folder), max_length=9)
    pq.write_table(pa.table({"a": [1.0]}), tmp_path / "t.parquet")
    with pytest.raises(SpecError, match="takes texts, chats or token ids, found samples of kind tensor"):
        tokenize_source(open_source(f"{tmp_path}/t.parquet?inputs=a"), vocabulary, max_length=9)


def test_a_full_or_closed_folder_is_named(tmp_path: Path, vocabulary: Vocabulary, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    data = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(
        DataError, match=r"tokenised documents cannot be written: .*another folder in \$SOFTLABEL_CACHE"
    ):
        tokenize_source(open_source(data), vocabulary, max_length=9)
    cache.unlink()
    found = tokenize_source(open_source(data), vocabulary, max_length=9)
    assert isinstance(found, TokenizedSource)
    content = pickle.dumps(found)
    shutil.rmtree(cache)
    with pytest.raises(DataError, match="tokenised documents cannot be read"):
        pickle.loads(content)
