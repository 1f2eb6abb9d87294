"""Tokens of a store as text, by the tokenizer that lies in the store itself."""

import json
from collections.abc import Sequence

from softlabel.errors import SpecError
from softlabel.inputs.tokenizer import Tokenizer
from softlabel.inputs.vocabulary import Vocabulary
from softlabel.store.reader import Store

_BEFORE = 8  # tokens that a text may depend on
_MOST, _LONGEST = 8, 4  # tokens that may end within a character one after another; bytes of one character
_OPEN = "\ufffd"  # what the decoder makes of an unfinished character


class TokenTexts:
    """Names of tokens, and the texts of a document's tokens.

    Attributes:
        note: why tokens are shown by their ids; '' where they are not.
        unknown: id of the token for what the tokenizer does not know; None for none.
    """

    def __init__(self, store: Store) -> None:
        self.note, self.unknown = "", None
        self._vocabulary: Vocabulary | None = None
        if (content := store.tokenizer) is None:
            self.note = "the store has no tokenizer: tokens are shown by their ids"
            return
        try:
            vocabulary = Vocabulary(Tokenizer(content))
            vocabulary.tokenizer.load()
        except SpecError as error:
            self.note = f"tokens are shown by their ids: {error}"
            return
        self._vocabulary = vocabulary
        model = json.loads(content).get("model") or {}
        found = model.get("unk_id")
        if found is None and isinstance(name := model.get("unk_token"), str):
            found = vocabulary.tokenizer.load().token_to_id(name)
        if isinstance(found, int) and 0 <= found < store.run.num_classes:
            self.unknown = found

    def name(self, number: int) -> str:
        """A token as the tokenizer's file writes it, '' where that is not known."""
        if self._vocabulary is None or number >= self._vocabulary.size:
            return ""
        return self._vocabulary.tokens[number] or ""

    def split(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token of a document; together they are the document.

        A character of several tokens stands with the last of them; the others have ''.
        """
        if self._vocabulary is None:
            return tuple(f"[{one}]" for one in ids)
        tokenizer, texts = self._vocabulary.tokenizer.load(), list[str]()
        whole_until = [0]  # places where a character ends

        def decode(start: int, stop: int) -> str:
            found: str = tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False)
            return found

        while (first := len(texts)) < len(ids):
            # Decoded with the tokens before: alone, a token may lose the space that it begins with. A decoder of bytes
            # spoils all bytes in a row if one of them is not of a whole character: where that is so before, alone.
            start = next((one for one in reversed(whole_until) if one <= first - _BEFORE), 0)
            before = decode(start, first)
            stops = range(first + 1, min(first + _MOST, len(ids)) + 1)
            for stop in stops:
                whole, alone = decode(start, stop), decode(first, stop)
                text = whole[len(before) :] if whole.startswith(before) else alone
                text = alone if text.endswith(_OPEN) else text
                if not text.endswith(_OPEN):
                    whole_until.append(stop)
                    break
            else:
                is_cut = stops.stop > len(ids) and len(stops) < _LONGEST  # the document ends within a character
                stop = len(ids) if is_cut else first + 1
                text = decode(first, stop)
            texts += [*[""] * (stop - first - 1), text]
        return tuple(texts)
