"""Vocabularies and chat templates, against the tokenizers of transformers."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from tests.support.language_models import CHATML, MARKED, find_stories, write_tokenizer

TEXTS = ["One day, Bob saw a cat.", "", "naïve — 日本語 \n\t x", "<s> </s> and a <unk>"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Really? <s>"},
    {"role": "assistant", "content": "Yes, a <b>cat</b>."},
]


def peer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def ids_of(vocabulary: Vocabulary, text: str) -> list[int]:
    (found,) = vocabulary.tokenizer.encode_batch([text], add_special_tokens=True)
    return list(found.ids)


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ({}, None),
        ({"add_bos_token": True, "add_eos_token": False}, None),
        ({"add_bos_token": False}, "add_bos_token is false, but tokenizer.json adds '<s>'"),
        ({"add_eos_token": True}, "add_eos_token is true, but tokenizer.json adds none"),
    ],
)
def test_ends_of_a_text_are_those_of_transformers(
    tmp_path: Path, flags: dict[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tokenizer(tmp_path, **flags)
    vocabulary, tokenizer = read_vocabulary(folder), peer(folder)
    for text in TEXTS:
        assert ids_of(vocabulary, text) == tokenizer(text)["input_ids"], text
    assert (vocabulary.bos, vocabulary.eos, vocabulary.size) == (tokenizer.bos_token_id, None, len(tokenizer))
    assert warning in caplog.text if warning else not caplog.records
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert (copy.fingerprint, ids_of(copy, TEXTS[0])) == (vocabulary.fingerprint, ids_of(vocabulary, TEXTS[0]))


def test_a_real_vocabulary() -> None:
    folder = find_stories()
    vocabulary, tokenizer = read_vocabulary(folder), peer(folder)
    assert (vocabulary.size, vocabulary.bos, vocabulary.eos) == (512, 1, None)
    text = "Once upon a time, there was a little girl — naïve."
    assert ids_of(vocabulary, text) == tokenizer(text)["input_ids"]


def test_a_difference_is_named_by_its_id_and_tokens(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "a")
    ours = read_vocabulary(folder)
    content = json.loads(ours.tokenizer.content)
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(content))
    theirs = read_vocabulary(tmp_path / "b")
    assert ours.fingerprint != theirs.fingerprint
    found = ours.find_difference(theirs)
    assert found is not None
    assert (found.id, found.ours, found.theirs) == (min(vocab["a"], vocab["b"]), "a", "b")
    assert str(found) == f"id {found.id} is 'a' and 'b'"

    more = read_vocabulary(write_tokenizer(tmp_path / "c", added=["<more>"]))
    assert str(ours.find_difference(more)) == f"id {ours.size} is no token and '<more>'"
    assert ours.find_difference(read_vocabulary(folder)) is None


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"tokenizer\.json: cannot be read"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match=r"tokenizer\.json: cannot be used"):
        read_vocabulary(tmp_path)
    built = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[X]": 1, "[Y]": 2}, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(single="[X] [Y] $A", special_tokens=[("[X]", 1), ("[Y]", 2)])
    built.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SpecError, match=r"at most one token at the beginning.*adds 2: '\[X\]', '\[Y\]'"):
        _ = read_vocabulary(tmp_path).bos


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("in_config", [True, False])
def test_chats_are_rendered_as_transformers_does(tmp_path: Path, template: str, in_config: bool) -> None:
    folder = write_tokenizer(tmp_path, template=template, in_config=in_config)
    found = read_vocabulary(folder).template
    assert found is not None
    text, spans = found.render_turns(CHAT)
    assert text == peer(folder).apply_chat_template(CHAT, tokenize=False)
    end = "" if template == MARKED else "<|im_end|>\n"
    assert [text[start:stop] for start, stop in spans] == [f"A cat.{end}", f"Yes, a <b>cat</b>.{end}"]
    assert pickle.loads(pickle.dumps(found)).render_turns(CHAT) == (text, spans)


def test_a_template_has_no_clock_and_no_way_out(tmp_path: Path) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}never{% endif %}"
    found = read_vocabulary(write_tokenizer(tmp_path, template=dated)).template
    assert found is not None
    assert found.render(CHAT)[0] == "never"
    for bad in (
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ):
        escaping = read_vocabulary(write_tokenizer(tmp_path, template=bad)).template
        assert escaping is not None
        with pytest.raises(BadImageError, match="the chat template fails"):
            escaping.render(CHAT)
    refusing = read_vocabulary(write_tokenizer(tmp_path, template="{{ raise_exception('roles must alternate') }}"))
    assert refusing.template is not None
    with pytest.raises(BadImageError, match="roles must alternate"):
        refusing.template.render(CHAT)
    broken = read_vocabulary(write_tokenizer(tmp_path, template="{% for %}"))
    assert broken.template is not None
    with pytest.raises(SpecError, match="chat template: line 1"):
        broken.template.render(CHAT)


def test_turns_that_are_written_otherwise_in_the_whole_chat_are_refused(tmp_path: Path) -> None:
    """As templates do that leave the thoughts out of all turns but the last."""
    forgetful = CHATML.replace("message['content']", "(message['content'] if loop.last else '...')")
    found = read_vocabulary(write_tokenizer(tmp_path, template=forgetful)).template
    assert found is not None
    with pytest.raises(DataError, match=r"chat up to message 3.*mark what the assistant says"):
        found.render_turns(CHAT)
