"""Documents of language models in columns: chats (``messages=``), or token ids (``tokens=`` and ``mask=``).

Legend: L tokens, R rows.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.dataset.table import is_list
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import InputKind, Raw, TokenIds
from softlabel.inputs.chat import CHATS, dump_messages
from softlabel.inputs.tokens import TOKENS, count_what_follows

# What a SOURCE calls them.
WORDS = ("messages", "tokens", "mask")
NO_LABELS = "what follows each token is its label"
_FORMS = {"image": "encoded images", "inputs": "columns of numbers", "text": "texts", "text_pair": "texts"}
_LABELS = ("label", "labels", "classes")
_NO_CHAT, _NO_TOKENS = BadImageError("the row has no messages"), BadImageError("the row has no token ids")


def chosen_columns(asked: Mapping[str, str | None], name: str) -> tuple[tuple[str, ...], InputKind] | None:
    """The columns that options choose, and the kind of their samples; None where they choose no documents.

    Args:
        asked: the options by name; those without a value are absent.
        name: the source, for errors.

    Raises:
        SpecError: they do not go together.
    """
    given = {word: value for word, value in asked.items() if value is not None}
    words = [word for word in WORDS if word in given]
    if not words:
        return None
    if "messages" in given and len(words) > 1:
        raise SpecError(f"{name}: messages= names chats, {words[1]}= token ids; give one of them")
    if words == ["mask"]:
        raise SpecError(f"{name}: mask= says which tokens count; name the column of the tokens too, with '?tokens='")
    if other := next((word for word in _FORMS if word in given), None):
        raise SpecError(f"{name}: {other}= names {_FORMS[other]}, {words[0]}= documents; give one of them")
    if other := next((word for word in _LABELS if word in given), None):
        raise SpecError(f"{name}: {other}= has no meaning beside {words[0]}=: {NO_LABELS}; leave it out")
    columns = tuple(given[word] for word in words)
    if len(set(columns)) < len(columns):
        raise SpecError(f"{name}: column {columns[0]!r} is tokens= and mask=; name another, or leave mask= out")
    return columns, CHATS if words == ["messages"] else TOKENS


def check_types(columns: Sequence[str], types: Sequence[pa.DataType], kind: InputKind, name: str) -> None:
    """Check that columns of a Parquet file hold documents.

    Raises:
        SpecError: they are of another type.
    """
    for place, (column, found) in enumerate(zip(columns, types, strict=True)):
        inner = found.value_type if is_list(found) else None
        if kind == CHATS:
            if not holds_messages(found):
                raise SpecError(
                    f"{name}: column {column!r}: expected lists of messages with role and content for messages=, found "
                    f"{found}"
                )
        elif inner is None or not (pa.types.is_integer(inner) or (place and pa.types.is_boolean(inner))):
            word = "mask" if place else "tokens"
            raise SpecError(f"{name}: column {column!r}: expected lists of whole numbers for {word}=, found {found}")


def holds_messages(found: pa.DataType) -> bool:
    """Whether a column of a Parquet file has chats."""
    if not (is_list(found) and pa.types.is_struct(found.value_type)):
        return False
    names = {field.name for field in found.value_type}
    return {"role", "content"} <= names


def parse_cell(value: object, kind: InputKind, place: int, where: str) -> str | list[int] | None:
    """The cell of a JSON object as it is kept in memory: a chat as JSON text, ids or a mask as numbers, None for none.

    Args:
        value: the cell.
        kind: chats or token ids.
        place: of the column among those chosen; the second is the mask.
        where: file, line and column, for errors.

    Raises:
        DataError: it is something else.
    """
    if value is None:
        return None
    if kind == CHATS:
        try:
            return dump_messages(value)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
    numbers = (int, bool) if place else int
    if not isinstance(value, list) or not all(isinstance(one, numbers) for one in value):
        raise DataError(f"{where}: expected a list of whole numbers, found {json.dumps(value)[:40]}")
    if not place and any(isinstance(one, bool) for one in value):
        raise DataError(f"{where}: expected token ids, found true or false; a mask is named with '?mask=COLUMN'")
    return [int(one) for one in value]


def store_cells(cells: Sequence[Any], kind: InputKind, name: str) -> pa.Array:
    """What `parse_cell` gave as an Arrow array. Raises DataError for numbers beyond 64 bits."""
    if kind == TOKENS:
        try:
            return pa.array(cells, type=pa.large_list(pa.int64()))
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"{name}: expected token ids, found a number beyond 64 bits: {error}") from error
    return pa.array(cells, type=pa.large_string())


def document_rows(columns: Sequence[Any], kind: InputKind) -> list[Raw]:
    """The samples in Arrow columns: JSON texts of chats, or token ids; what cannot be used makes its row bad."""
    if kind == CHATS:
        return [read_chat(cell) for cell in columns[0].to_pylist()]
    tokens, *masks = columns
    found: list[Raw] = []
    for row in range(len(tokens)):
        ids = tokens[row].values
        found.append(_NO_TOKENS if ids is None else _ids_of(ids, masks[0][row].values if masks else None, bool(masks)))
    return found


def read_chat(cell: Any) -> Raw:
    """The JSON text of a chat, or why there is none."""
    if isinstance(cell, str):  # dumped while it was read
        return cell
    try:
        found = dump_messages(cell)
    except ValueError as error:
        return BadImageError(str(error))
    return _NO_CHAT if found is None else found


def _ids_of(ids: pa.Array, mask: pa.Array | None, masked: bool) -> Raw:
    ids_L = _numbers_of(ids)
    if ids_L is None or (len(ids_L) and not 0 <= ids_L.min() <= ids_L.max() < 2**31):
        return BadImageError("expected token ids from 0, found others")
    if not masked:
        return TokenIds(ids=ids_L.astype(np.int32), mask=np.ones(len(ids_L), np.uint8))
    mask_L = None if mask is None else _numbers_of(mask)
    if mask_L is None or not np.isin(mask_L, (0, 1)).all():
        return BadImageError("expected a mask of 0 and 1, found another")
    if len(mask_L) != len(ids_L):
        return BadImageError(f"expected a mask of {len(ids_L)} entries, one for each token, found {len(mask_L)}")
    return TokenIds(ids=ids_L.astype(np.int32), mask=count_what_follows(mask_L))


def _numbers_of(values: pa.Array) -> NDArray[Any] | None:
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return None if values.null_count else found.astype(np.int64)


def peek_documents(path: str) -> dict[str, str] | None:
    """The options that a `.jsonl` file of documents needs, by its first line; None for other files."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = json.loads(next(line for line in file if line.strip()))
        if isinstance(first.get("messages"), list):
            dump_messages(first["messages"])
            return {"messages": "messages"}
    except (OSError, ValueError, StopIteration, AttributeError):
        return None
    return {"text": "text"} if isinstance(first.get("text"), str) else None
