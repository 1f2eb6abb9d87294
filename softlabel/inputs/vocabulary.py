"""The vocabulary of a language model: its tokens by id, and how a text becomes ids.

    read_vocabulary(FOLDER) -> Vocabulary        tokenizer.json, tokenizer_config.json, chat_template.jinja

Two models can share labels where their vocabularies are equal token by token (`fingerprint`, `find_difference`),
whatever else their files say. Which ids the tokens of a text get also depends on merges and normalisation: the content
hash of every document covers those.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softlabel.errors import SpecError
from softlabel.inputs.chat import ChatTemplate
from softlabel.inputs.json_object import read_object
from softlabel.inputs.tokenizer import TOKENIZER, Tokenizer

log = logging.getLogger("softlabel")

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDifference:
    """The first id that stands for different tokens in two vocabularies; None for a token that one does not have."""

    id: int
    ours: str | None
    theirs: str | None

    def __str__(self) -> str:
        ours, theirs = ("no token" if one is None else repr(one) for one in (self.ours, self.theirs))
        return f"id {self.id} is {ours} and {theirs}"


class Vocabulary:
    """The tokens of a `tokenizer.json`, with the added ones. It can be pickled.

    Attributes:
        tokenizer: splits texts; its `content` states which tokens it adds at the beginning and at the end.
        template: of chats; None where the folder has none.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self.tokenizer, self.template)

    def files(self) -> dict[str, bytes]:
        """What `read_vocabulary` reads, by the names of the files."""
        found = {TOKENIZER: self.tokenizer.content}
        if self.template is not None:
            found[_TEMPLATE] = self.template.source.encode()
            found[_CONFIG] = (json.dumps(self.template.special, indent=2) + "\n").encode()
        return found

    @cached_property
    def tokens(self) -> tuple[str | None, ...]:
        """The tokens by id, as the file writes them; None for an id that no token has."""
        ids: dict[str, int] = self.tokenizer.load().get_vocab(with_added_tokens=True)
        if not ids:
            raise SpecError(f"{TOKENIZER}: expected tokens, found none")
        found: list[str | None] = [None] * (1 + max(ids.values()))
        for token, number in ids.items():
            found[number] = token
        return tuple(found)

    @property
    def size(self) -> int:
        """The number of ids: that of the classes of a teacher, however many rows its last layer is padded to."""
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens in the order of their ids: id and length of the UTF-8 bytes as ``<i4``, the bytes."""
        digest = hashlib.sha256()
        for number, token in enumerate(self.tokens):
            if token is not None:
                encoded = token.encode("utf-8", "surrogatepass")
                digest.update(number.to_bytes(4, "little") + len(encoded).to_bytes(4, "little") + encoded)
        return digest.hexdigest()

    def find_difference(self, other: "Vocabulary") -> TokenDifference | None:
        """The first id whose token differs in another vocabulary; None where they are equal."""
        ours, theirs = self.tokens, other.tokens
        for number in range(max(len(ours), len(theirs))):
            one = ours[number] if number < len(ours) else None
            two = theirs[number] if number < len(theirs) else None
            if one != two:
                return TokenDifference(id=number, ours=one, theirs=two)
        return None

    @cached_property
    def _ends(self) -> tuple[int | None, int | None]:
        encoding = self.tokenizer.load().encode("a")
        is_special = list(encoding.special_tokens_mask)
        text = [place for place, special in enumerate(is_special) if not special]
        # A vocabulary without this letter: what is added is taken to be at the beginning.
        before, after = (encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]) if text else (encoding.ids, [])
        for where, ids in (("beginning", before), ("end", after)):
            if len(ids) > 1:
                raise SpecError(
                    f"{TOKENIZER}: expected at most one token at the {where} of a text, found that it adds {len(ids)}: "
                    f"{', '.join(repr(self.tokens[one]) for one in ids)}; tokenise the texts yourself, and give "
                    "'?tokens=COLUMN'"
                )
        return before[0] if before else None, after[0] if after else None

    @property
    def bos(self) -> int | None:
        """The id that the tokenizer puts before a text; None for none."""
        return self._ends[0]

    @property
    def eos(self) -> int | None:
        """The id that the tokenizer puts behind a text; None for none."""
        return self._ends[1]


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """The vocabulary of a folder as transformers' save_pretrained writes it.

    The tokens at the beginning and at the end of a text are those that tokenizer.json adds, as in transformers 5;
    `add_bos_token` and `add_eos_token` of tokenizer_config.json are compared with it, and a difference is reported.

    Raises:
        SpecError: a file is not there, or cannot be used.
    """
    folder = Path(folder)
    path = folder / TOKENIZER
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"{path}: cannot be read ({error.strerror}); save the tokenizer there, as save_pretrained of a fast "
            "tokenizer does"
        ) from error
    config = read_object(folder / _CONFIG)
    vocabulary = Vocabulary(Tokenizer(content), _read_template(folder, config, _find_special(config)))
    vocabulary.tokenizer.load()  # refuses a file that cannot be used
    _warn_of_ends(vocabulary, config, folder / _CONFIG)
    return vocabulary


def _find_special(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by the names that templates use for them."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _warn_of_ends(vocabulary: Vocabulary, config: Mapping[str, Any], path: Path) -> None:
    """Report where the config states other tokens at the ends of a text than tokenizer.json adds."""
    for name in ("bos", "eos"):
        if (asked := config.get(f"add_{name}_token")) is None:
            continue
        found = vocabulary.bos if name == "bos" else vocabulary.eos
        if bool(asked) != (found is not None):
            log.warning(
                "warning: %s: add_%s_token is %s, but %s adds %s, which is what counts, as in transformers 5; save the "
                "tokenizer again if the other was meant",
                path,
                name,
                json.dumps(asked),
                TOKENIZER,
                "none" if found is None else repr(vocabulary.tokens[found]),
            )


def _read_template(folder: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    path = folder / _TEMPLATE
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), special)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, list):  # of several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        if "default" not in named:
            raise SpecError(
                f"{folder / _CONFIG}: chat_template: expected one called default, found "
                f"{', '.join(map(repr, named))}; keep the one that is meant"
            )
        found = named["default"]
    return ChatTemplate(found, special) if isinstance(found, str) else None
