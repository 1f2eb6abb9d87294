"""A `tokenizer.json`, as Hugging Face's tokenizers library runs it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from softlabel.errors import SpecError
from softlabel.inputs.base import Text

TOKENIZER = "tokenizer.json"


class Tokenizer:
    """What `tokenizer.json` says. It can be pickled.

    Attributes:
        content: the bytes of the file.
        fingerprint: their SHA-256.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.fingerprint = content, hashlib.sha256(content).hexdigest()
        # By length and side of truncation: threads share them, so that none is changed after it was made.
        self._loaded: dict[tuple[int | None, str], Any] = {}

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.content,)

    def load(self, max_length: int | None = None, side: str = "right") -> Any:
        """The library's own tokenizer, without padding, and truncated to a length where one is given.

        Raises:
            SpecError: the library is not installed, or cannot use the file.
        """
        if (loaded := self._loaded.get((max_length, side))) is None:
            loaded = self._loaded[max_length, side] = self._load(max_length, side)
        return loaded

    def _load(self, max_length: int | None, side: str) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise SpecError(f"texts need the tokenizers library ({error}); pip install 'softlabel[hf]'") from error
        try:
            loaded = tokenizers.Tokenizer.from_str(self.content.decode())
        except Exception as error:  # the library raises plain Exception
            raise SpecError(f"tokenizer.json: cannot be used: {error}") from error
        # Lengths are those of the transform, whatever the file was saved with.
        loaded.no_padding()
        if max_length is None:
            loaded.no_truncation()
        else:
            loaded.enable_truncation(max_length, strategy="longest_first", direction=side)
        return loaded

    @property
    def truncation_side(self) -> str:
        """Where the file says that texts lose their end: ``right`` or ``left``."""
        return str((json.loads(self.content).get("truncation") or {}).get("direction", "right")).lower()

    def encode(self, text: Text, max_length: int, side: str) -> tuple[list[int], list[int], bool]:
        """Token ids and segments of a text, at most `max_length`, and whether it was truncated at that side."""
        found = self.load(max_length, side).encode(*((text,) if isinstance(text, str) else text))
        return found.ids, found.type_ids, bool(found.overflowing)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Any]:
        """The library's encodings of whole texts (`ids`, `offsets`), on all processors."""
        found: list[Any] = self.load().encode_batch(texts, add_special_tokens=add_special_tokens)
        return found
