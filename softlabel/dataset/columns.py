"""Which columns of a table are the samples, their keys and their labels.

Legend: N rows.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from softlabel.dataset.documents import check_types, chosen_columns, holds_messages
from softlabel.dataset.hard_labels import choose_label, usual_labels
from softlabel.dataset.multi_hot_columns import find_multi_hot_columns
from softlabel.dataset.table import check_input_columns, holds_lists, holds_numbers
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import InputKind
from softlabel.inputs.chat import CHATS
from softlabel.inputs.image_decode import IMAGES
from softlabel.inputs.tensor import TENSORS
from softlabel.inputs.text import TEXTS

ALL = "*"  # of ``inputs=``
# The index of a pandas table, in Parquet and in CSV: the number of the row, which is no property of the sample.
_INDEX = re.compile(r"|__index_level_\d+__")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where in the schema the sample, its key and its label are; None for a key that is the row number, or no label.

    Attributes:
        inputs: the column of encoded images, or those of the numbers, or the one or two of the texts, of a sample.
        kind: which of these.
        other_labels: columns that sound like labels too.
        no_labels: columns that sound like labels, and hold more than one class a row.
        candidates: columns of numbers or texts, where there is no label.
        multi_hot: the columns that say of every class whether a row has it: one for each, or one of lists.
    """

    inputs: tuple[str, ...]
    kind: InputKind
    key: str | None
    label: str | None
    class_names: tuple[str, ...] | None
    other_labels: tuple[str, ...] = ()
    no_labels: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    multi_hot: tuple[str, ...] = ()


def find_columns(schema: pa.Schema, asked: Mapping[str, str], name: str, *, ignore_labels: bool) -> Columns:
    """Find the columns of a schema.

    Args:
        schema: the file's schema.
        asked: the user's ``image``, ``inputs``, ``text``, ``text_pair``, ``messages``, ``tokens``, ``mask``, ``key``,
            ``label`` and ``labels``.
        name: the source, for errors.
        ignore_labels: read no labels; ``inputs=*`` leaves their columns out all the same.

    Raises:
        SpecError: an option names a column that is missing or has the wrong type, or contradicts another one.
        DataError: without an option, a column is missing, ambiguous or has the wrong type.
    """
    features = _read_features(schema)
    inputs: tuple[str, ...]
    kind: InputKind
    if documents := _document_columns(schema, features, asked, name):
        (inputs, kind), key, ignore_labels = documents, None, True
    elif "inputs" in asked:
        inputs, key, kind = _input_columns(schema, features, asked, name), None, TENSORS
    elif texts := _text_columns(schema, features, asked, name):
        inputs, key, kind = texts, None, TEXTS
    else:
        kind = IMAGES
        inputs, key = _image_and_key(schema, features, asked.get("image"), name)
    if "key" in asked:
        key = None if asked["key"] == "index" else asked["key"]
    if key is not None and not _is_key(found := plain(_find_field(schema, key, name).type)):
        raise (SpecError if "key" in asked else DataError)(
            f"{name}: column {key!r}: expected strings or integers for the keys, found {found}; "
            "number the rows with '?key=index'"
        )
    if ignore_labels:
        asked = {**{word: value for word, value in asked.items() if word != "labels"}, "label": "none"}
    several = find_multi_hot_columns({field.name: field.type for field in schema}, asked, name)
    label, others = (several[0], ()) if several else _find_label_column(schema, features, asked.get("label"), name)
    if kind != IMAGES and (both := next((one for one in (label, *several) if one in inputs), None)):
        raise SpecError(f"{name}: column {both!r} is an input and the label; choose another with '?label=COLUMN|none'")
    taken = {*inputs, inputs[0].partition(".")[0], key, *others}
    candidates = [field.name for field in schema if _is_label(field.type) and field.name not in taken]
    return Columns(
        inputs=inputs,
        kind=kind,
        key=key,
        label=label,
        class_names=several if len(several) > 1 else _class_names(features, label),
        other_labels=tuple(other for other in others if _is_label(schema.field(other).type)),
        no_labels=tuple(other for other in others if not _is_label(schema.field(other).type)),
        candidates=tuple(candidates) if label is None else (),
        multi_hot=several,
    )


def _document_columns(
    schema: pa.Schema, features: dict[str, Mapping[str, Any]], asked: Mapping[str, str], name: str
) -> tuple[tuple[str, ...], InputKind] | None:
    """The columns of chats or token ids, and which of these; None where the file has other samples."""
    if found := chosen_columns(asked, name):
        columns, kind = found
        check_types(columns, [_find_field(schema, column, name).type for column in columns], kind, name)
        return found
    others = {"image", "inputs", "text", "text_pair", "label", "labels"} & asked.keys()
    if others or "messages" not in schema.names or "text" in schema.names or _image_columns(schema, features):
        return None
    return (("messages",), CHATS) if holds_messages(schema.field("messages").type) else None


def _text_columns(
    schema: pa.Schema, features: dict[str, Mapping[str, Any]], asked: Mapping[str, str], name: str
) -> tuple[str, ...]:
    """The column of texts, and that of the second of each pair; none where the file has images."""
    words = [word for word in ("text", "text_pair") if word in asked]
    if not words:
        if "image" in asked or "text" not in schema.names or _image_columns(schema, features):
            return ()
        kind = plain(schema.field("text").type)
        return ("text",) if pa.types.is_string(kind) or pa.types.is_large_string(kind) else ()
    if "image" in asked:
        raise SpecError(f"{name}: image= names encoded images, {words[0]}= columns of texts; give one of them")
    columns = (asked.get("text", "text"), *([asked["text_pair"]] if "text_pair" in asked else []))
    for column in columns:
        kind = plain(_find_field(schema, column, name).type)
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise SpecError(f"{name}: column {column!r}: expected texts, found {kind}; name theirs with '?text='")
    if len(set(columns)) < len(columns):
        raise SpecError(f"{name}: column {columns[0]!r} is text= and text_pair=; name another, or leave text_pair= out")
    return columns


def _input_columns(
    schema: pa.Schema, features: dict[str, Mapping[str, Any]], asked: Mapping[str, str], name: str
) -> tuple[str, ...]:
    """Columns of numbers, in the order in which a sample has them."""
    others = {"image": "encoded images", "text": "texts", "text_pair": "texts"}
    if other := next((word for word in others if word in asked), None):
        raise SpecError(f"{name}: {other}= names {others[other]}, inputs= columns of numbers; give one of them")
    if asked["inputs"] == ALL:
        return _all_numbers(schema, features, asked, name)
    columns = tuple(asked["inputs"].split(","))
    if again := next((column for column in columns if columns.count(column) > 1), None):
        raise SpecError(f"{name}: inputs=: column {again!r} is given twice")
    check_input_columns(columns, [_find_field(schema, column, name).type for column in columns], name)
    return columns


def _all_numbers(
    schema: pa.Schema, features: dict[str, Mapping[str, Any]], asked: Mapping[str, str], name: str
) -> tuple[str, ...]:
    """The columns of one number each that are no key and no label, in the order of the file.

    Labels are left out whether they are read or not, so that they never become inputs. Without ``label=COLUMN`` these
    are all columns whose names suggest some.
    """
    left_out = {asked["key"]} if asked.get("key", "index") != "index" else set()
    if "labels" in asked:
        left_out |= set(asked["labels"].split(","))
    elif asked.get("label", "none") != "none":
        left_out.add(asked["label"])
    else:
        label, others = None, tuple(usual_labels(schema.names))
        if "label" not in asked:
            label, others = _find_label_column(schema, features, None, name)
        left_out |= {*([label] if label else []), *others}
    fields = [field for field in schema if field.name not in left_out and not _INDEX.fullmatch(field.name)]
    if lists := next((field for field in fields if holds_lists(field.type)), None):
        raise SpecError(
            f"{name}: inputs={ALL}: expected columns of one number each, found {lists.name!r} of {lists.type}; name "
            "the columns with '?inputs=COLUMN,COLUMN'"
        )
    columns = tuple(field.name for field in fields if holds_numbers(field.type))
    if not columns:
        raise SpecError(
            f"{name}: inputs={ALL}: expected a column of numbers beside key and labels, found none among "
            f"{', '.join(schema.names)}; name columns with '?inputs=COLUMN,COLUMN'"
        )
    if odd := next((column for column in columns if "," in column or columns.count(column) > 1), None):
        raise DataError(
            f"{name}: inputs={ALL}: column {odd!r}: expected names without a comma, each once, so that they can be "
            "recorded; rename it"
        )
    return columns


def _image_and_key(
    schema: pa.Schema, features: dict[str, Mapping[str, Any]], asked: str | None, name: str
) -> tuple[tuple[str], str | None]:
    """The column of encoded images, and that of their paths where there is one."""
    image = asked or _find_image_column(schema, features, name)
    field = _find_field(schema, image, name)
    if pa.types.is_struct(field.type):
        inner = {field.type.field(i).name for i in range(field.type.num_fields)}
        if "bytes" not in inner:
            raise (SpecError if asked else DataError)(
                f"{name}: column {image!r}: expected a struct with 'bytes', found {', '.join(sorted(inner))}"
            )
        image_path, key = f"{image}.bytes", f"{image}.path" if "path" in inner else None
    else:
        image_path, key = image, None
    kind = _find_field(schema, image_path, name).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise (SpecError if asked else DataError)(
            f"{name}: column {image_path!r}: expected encoded images as binary, found {kind}; "
            "name theirs with '?image=', or columns of numbers with '?inputs='"
        )
    return (image_path,), key


def _is_key(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _read_features(schema: pa.Schema) -> dict[str, Mapping[str, Any]]:
    """Return the column descriptions of Hugging Face `datasets`; empty for other files."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {k: v for k, v in noted.items() if isinstance(v, Mapping) and k in schema.names}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _find_field(schema: pa.Schema, path: str, name: str) -> pa.Field:
    first, _, rest = path.partition(".")
    if path in schema.names:
        return schema.field(path)
    if rest and first in schema.names and pa.types.is_struct(schema.field(first).type):
        struct = schema.field(first).type
        if struct.get_field_index(rest) >= 0:
            return struct.field(rest)
    raise SpecError(f"{name}: no column {path!r}; the file has {', '.join(schema.names)}")


def _image_columns(schema: pa.Schema, features: dict[str, Mapping[str, Any]]) -> list[str]:
    noted = [column for column, feature in features.items() if feature.get("_type") == "Image"]
    return noted or [column for column in ("image", "img") if column in schema.names]


def _find_image_column(schema: pa.Schema, features: dict[str, Mapping[str, Any]], name: str) -> str:
    noted = [column for column, feature in features.items() if feature.get("_type") == "Image"]
    found = _image_columns(schema, features)
    if len(found) == 1 or (found and not noted):
        return found[0]
    raise DataError(
        f"{name}: expected one image column, found {', '.join(found) or 'none'} among {', '.join(schema.names)}; "
        "name it with '?image=COLUMN', columns of numbers with '?inputs=COLUMN,COLUMN', or texts with '?text=COLUMN'"
    )


def _find_label_column(
    schema: pa.Schema, features: dict[str, Mapping[str, Any]], asked: str | None, name: str
) -> tuple[str | None, tuple[str, ...]]:
    """Return the label column, and other columns whose names suggest labels."""
    if asked == "none":
        return None, ()
    others: tuple[str, ...] = ()
    if asked is None:
        noted = [column for column, feature in features.items() if feature.get("_type") == "ClassLabel"]
        # Columns such as boxes do not hold the class of an image.
        usable = [field.name for field in schema if _is_label(field.type)]
        remedy = "choose with '?label=COLUMN' or '?label=none'"
        asked, others = noted[0] if len(noted) == 1 else None, ()
        if asked is None:
            asked, others = choose_label(noted or usable, subject=name, remedy=remedy)
        if asked is None and noted:
            raise DataError(f"{name}: more than one label column: {', '.join(noted)}; {remedy}")
        also = usual_labels(schema.names)
        others = tuple(dict.fromkeys(column for column in (*others, *noted, *also) if column != asked))
        if asked is None:
            return None, others
    kind = plain(_find_field(schema, asked, name).type)
    if not _is_label(kind):
        raise SpecError(
            f"{name}: column {asked!r}: expected class numbers, found {kind}; name another with '?label=COLUMN', or "
            "go without with '?label=none'"
        )
    return asked, others


def plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, without dictionary encoding."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_label(kind: pa.DataType) -> bool:
    kind = plain(kind)
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_null(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def _class_names(features: dict[str, Mapping[str, Any]], label: str | None) -> tuple[str, ...] | None:
    names = features.get(label, {}).get("names") if label else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None
