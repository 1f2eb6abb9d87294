"""From a source of texts, chats or token ids to documents of a vocabulary, whose lengths are known.

    source = tokenize_source(open_source("chats.jsonl?messages=messages"), read_vocabulary(FOLDER), max_length=4096)
    source.lengths       int32 (N,), 0 for a bad document
    source.read([3])     Sample(raw=TokenIds(ids=..., mask=...)); hard labels there are none

All of the data are tokenised once; see `token_file` for what is kept of it.

Legend: L tokens of a document, N documents.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels
from softlabel.dataset.documents import NO_LABELS
from softlabel.dataset.findings import Findings
from softlabel.dataset.source import FileStamp, Source, span
from softlabel.dataset.token_file import Left, TokenFile, TokenWriter, locked_path
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import IGNORE, Sample, TokenIds
from softlabel.inputs.chat import CHATS
from softlabel.inputs.text import TEXTS
from softlabel.inputs.tokens import EMPTY, TOKENS, count_what_follows
from softlabel.inputs.vocabulary import Vocabulary

log = logging.getLogger("softlabel")

_AT_ONCE = 1024  # documents tokenised together, on all processors
_VERSION = 1  # of what is made of the same data

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """How documents were made.

    Attributes:
        vocabulary: its fingerprint.
        max_length: tokens of a document; what is behind them was left out.
        template: fingerprint of the chat template; None where the data are no chats.
        bos, eos: ids that were put before and behind a text; None for none, and for chats and token ids.
    """

    vocabulary: str
    max_length: int
    template: str | None = None
    bos: int | None = None
    eos: int | None = None


class TokenizedSource(Source):
    """The documents of another source, in its order and with its keys.

    Attributes:
        tokenization: how they were made.
        counted: int32 (N,): at how many positions of a document what follows counts.
        truncated: how many documents lost their end.
    """

    inputs = TOKENS
    lengths: NDArray[np.int32]

    def __init__(self, base: Source, file: TokenFile, tokenization: Tokenization) -> None:
        self.base, self._file, self.tokenization = base, file, tokenization
        self.copy_attributes(base)
        self.inputs, self.has_labels, self.class_names, self.label_width = TOKENS, False, None, None
        self.findings = Findings(without_labels=NO_LABELS, left_out=base.findings.left_out, notes=base.findings.notes)
        self.maybe_repeated_keys, self.repeated_keys_remedy = base.maybe_repeated_keys, base.repeated_keys_remedy
        self.lengths, self._left = file.lengths, file.left
        self.truncated = self._left.truncated
        self.counted = self._count()

    @property
    def checksum(self) -> str:
        """The XXH3-128 of all ids, masks and lengths."""
        return self._file.checksum

    def _count(self) -> NDArray[np.int32]:
        if self._file.mask is None:
            return self.lengths
        counted_N = np.zeros(len(self.lengths), np.int32)
        has_N = self.lengths > 0
        if has_N.any():  # reduceat gives an element of the next one for an empty range
            counted_N[has_N] = np.add.reduceat(self._file.mask, self._file.starts[:-1][has_N], dtype=np.int32)
        return counted_N

    def __len__(self) -> int:
        return len(self.lengths)

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return self.base.keys(start, stop)

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        return self.base.key_table(start, stop)

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        return np.full(stop - start, IGNORE, dtype=np.int64)

    def fingerprint(self) -> str:
        return self.base.fingerprint()

    def stamp(self) -> tuple[FileStamp, ...] | None:
        return self.base.stamp()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows = np.asarray(indices, dtype=np.int64).tolist()
        keys = self._read_keys(rows)
        found = []
        for row, key in zip(rows, keys, strict=True):
            ids_L, mask_L = self._file.document(row)
            bad = None if len(ids_L) else BadImageError(self._left.bad.get(row, EMPTY))
            found.append(Sample(key=key, raw=bad or TokenIds(ids=ids_L, mask=mask_L)))
        return found

    def _read_keys(self, rows: Sequence[int]) -> list[str]:
        if not rows:
            return []
        first, last = min(rows), max(rows) + 1
        if last - first > 8 * len(rows):  # far apart
            return [self.base.keys(row, row + 1)[0] for row in rows]
        keys = self.base.keys(first, last)
        return [keys[row - first] for row in rows]


def tokenize_source(
    source: Source, vocabulary: Vocabulary, *, max_length: int, show: bool | None = None
) -> TokenizedSource:
    """Make documents of token ids of all samples, or map those that were made before.

    Args:
        source: of texts, of chats, or of token ids, which are taken as they are.
        vocabulary: whose tokenizer and chat template are used.
        max_length: tokens of a document; the rest of a longer one is left out.
        show: a progress bar; None: if standard error is a terminal.

    Returns:
        The same samples as documents. Those without a token are bad.

    Raises:
        SpecError: samples of another kind, pairs of texts, or chats without a chat template.
        DataError: token ids of another vocabulary, turns of a chat that cannot be found, or a full disk.
    """
    if isinstance(source, TokenizedSource):
        source = source.base
    tokenization = _check_source(source, vocabulary, max_length)
    place = _find_place(source, tokenization, vocabulary)
    identity = {"data": _identify_data(source), "documents": len(source), **place}
    with locked_path(xxhash.xxh3_128_hexdigest(json.dumps(place).encode())) as path:
        file = TokenFile.read(path, identity)
        if file is None:
            _write_file(source, vocabulary, max_length, path, identity, show)
            file = TokenFile.read(path, identity)
            assert file is not None, path
    found = TokenizedSource(source, file, tokenization)
    _report(found)
    return found


def _check_source(source: Source, vocabulary: Vocabulary, max_length: int) -> Tokenization:
    if max_length < 1:
        raise SpecError(f"max_length: expected at least 1 token, found {max_length}")
    if source.inputs not in (TEXTS, CHATS, TOKENS):
        raise SpecError(
            f"{source.name}: a language model takes texts, chats or token ids, found {source.inputs.noun} of kind "
            f"{source.inputs.name}; name their column with '?text=', '?messages=' or '?tokens='"
        )
    if source.inputs == TOKENS:
        return Tokenization(vocabulary=vocabulary.fingerprint, max_length=max_length)
    if source.inputs == TEXTS:
        return Tokenization(
            vocabulary=vocabulary.fingerprint, max_length=max_length, bos=vocabulary.bos, eos=vocabulary.eos
        )
    if vocabulary.template is None:
        raise SpecError(
            f"{source.name}: messages= needs a chat template, found none beside the tokenizer; save it as "
            "chat_template.jinja there, or give texts with '?text='"
        )
    return Tokenization(
        vocabulary=vocabulary.fingerprint, max_length=max_length, template=vocabulary.template.fingerprint
    )


def _find_place(source: Source, tokenization: Tokenization, vocabulary: Vocabulary) -> dict[str, Any]:
    """What says which file of the cache is meant: all but whether the data have changed since."""
    stamps = source.stamp()
    return {
        "version": _VERSION,
        "tokenizers": version("tokenizers"),
        "source": source.name,
        "paths": None if stamps is None else [path for path, _, _ in stamps],
        "keys": source.fingerprint(),
        "tokenizer": vocabulary.tokenizer.fingerprint,
        **asdict(tokenization),
    }


def _identify_data(source: Source) -> Any:
    """The state of the data's files, or else the hash of all samples."""
    if (stamps := source.stamp()) is not None:
        return [list(stamp) for stamp in stamps]
    digest = xxhash.xxh3_128()
    for samples in _iter_samples(source):
        for sample in samples:
            digest.update((source.inputs.content_hash(sample.raw) or 0).to_bytes(8, "little"))
            if isinstance(sample.raw, TokenIds):
                digest.update(sample.raw.mask.data)
    return digest.hexdigest()


def _iter_samples(source: Source) -> Iterator[list[Sample]]:
    for first, last in source.blocks():
        for start in range(first, last, _AT_ONCE):
            yield source.read(range(start, min(start + _AT_ONCE, last)))


def _write_file(
    source: Source, vocabulary: Vocabulary, max_length: int, path: Any, identity: dict[str, Any], show: bool | None
) -> None:
    dtype = "<u2" if vocabulary.size <= 1 << 16 else "<i4"
    bad: dict[int, str] = {}
    truncated = dropped = total = number = 0
    bar = tqdm(
        total=len(source),
        unit=source.inputs.unit,
        unit_scale=True,
        desc="tokenising",
        disable=None if show is None else not show,
    )
    with bar, TokenWriter(path, dtype) as writer:
        for samples in _iter_samples(source):
            for one in tokenize_samples(samples, source, vocabulary):
                if isinstance(one, str):
                    bad[number], one = one, TokenIds(ids=np.empty(0, np.int32), mask=np.empty(0, np.uint8))
                truncated += len(one.ids) > max_length
                dropped += max(0, len(one.ids) - max_length)
                total += min(max_length, len(one.ids))
                writer.add(one.ids[:max_length], one.mask[:max_length])
                number += 1
            bar.update(len(samples))
            if (seconds := bar.format_dict["elapsed"]) and not bar.disable:
                bar.set_postfix_str(f"{total / seconds:,.0f} tokens/s", refresh=False)
        writer.finish(identity, Left(truncated=truncated, dropped=dropped, bad=bad))


def tokenize_samples(samples: Sequence[Sample], source: Source, vocabulary: Vocabulary) -> list[TokenIds | str]:
    """The whole document of each sample, or why it has none.

    Args:
        samples: of a source of texts, chats or token ids.
        source: that one.
        vocabulary: whose tokenizer and chat template are used.

    Raises:
        SpecError, DataError: as `tokenize_source`.
    """
    found: list[TokenIds | str | None] = [None] * len(samples)
    texts: dict[int, str] = {}
    turns: dict[int, list[Span]] = {}
    for place, sample in enumerate(samples):
        raw = sample.raw
        try:
            if isinstance(raw, TokenIds):
                found[place] = _check_ids(raw, vocabulary) if len(raw.ids) else EMPTY
                continue
            text, _ = source.inputs.decode(sample)
            if not isinstance(text, str):
                raise SpecError("a document is one text, found a pair of them; leave text_pair= out")
            if source.inputs == CHATS:
                assert vocabulary.template is not None
                text, turns[place] = vocabulary.template.render_turns(json.loads(text))
            texts[place] = text
        except BadImageError as error:
            found[place] = str(error)
        except (DataError, SpecError) as error:
            raise type(error)(f"{source.name}: sample {sample.key!r}: {error}") from error
    encodings = _encode(list(texts.values()), vocabulary, add_special_tokens=source.inputs == TEXTS)
    for place, encoding in zip(texts, encodings, strict=True):
        ids_L = np.array(encoding.ids, np.int32)
        mask_L = np.ones(len(ids_L), np.uint8)
        if place in turns:
            mask_L = count_what_follows(_find_tokens(encoding.offsets, turns[place]))
        found[place] = TokenIds(ids=ids_L, mask=mask_L) if len(ids_L) else EMPTY
    return [one for one in found if one is not None]


def _encode(texts: list[str], vocabulary: Vocabulary, *, add_special_tokens: bool) -> list[Any]:
    # Otherwise the library prints a warning in each process that is forked later, which does not use its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return vocabulary.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)


def _find_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """bool (L,): the tokens of which a character lies in one of the spans, as transformers finds them."""
    offsets_L2 = np.array(offsets, np.int64).reshape(-1, 2)
    inside_L = np.zeros(len(offsets_L2), np.bool_)
    for start, stop in spans:
        inside_L |= (offsets_L2[:, 0] < stop) & (offsets_L2[:, 1] > start)
    return inside_L


def _check_ids(raw: TokenIds, vocabulary: Vocabulary) -> TokenIds:
    if (largest := int(raw.ids.max())) >= vocabulary.size:
        raise DataError(
            f"expected token ids below {vocabulary.size}, the size of the vocabulary, found {largest}; give the "
            "tokenizer that they were made with"
        )
    return raw


def _report(source: TokenizedSource) -> None:
    tokens, documents = int(source.lengths.sum(dtype=np.int64)), int((source.lengths > 0).sum())
    counted = int(source.counted.sum(dtype=np.int64))
    log.info(
        "%s: %s tokens in %s documents, %s each, %s at most%s",
        source.name,
        f"{tokens:,}",
        f"{documents:,}",
        f"{tokens / max(1, documents):,.0f}",
        f"{int(source.lengths.max(initial=0)):,}",
        f"; what follows counts at {counted:,} of them" if counted != tokens else "",
    )
    if source.truncated:
        log.warning(
            "warning: %s: %d of %d documents %s longer than %d tokens and %s, %d tokens in all; a larger max_length "
            "takes more",
            source.name,
            source.truncated,
            len(source),
            "is" if source.truncated == 1 else "are",
            source.tokenization.max_length,
            "loses its end" if source.truncated == 1 else "lose their end",
            source._left.dropped,
        )
