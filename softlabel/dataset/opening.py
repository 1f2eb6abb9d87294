"""SOURCE: the words in which a user names a dataset.

    FILE.parquet[?image=COLUMN&label=COLUMN|none&key=COLUMN|index]     Hugging Face image layout
    FOLDER[?files=GLOB&...]             a folder of such files, in the order of their names
    FOLDER[?labels=folders|none]        a folder of images (see `folder.open_folder`)
    torchvision:NAME?root=...&train=true    any class of torchvision.datasets, with its arguments
    digits                              scikit-learn's handwritten digits, 8x8 grey

`rows=START:STOP` takes a part of any of them.
"""

import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from softlabel.dataset.base import PartSource, Source
from softlabel.dataset.folder import IMAGE_SUFFIXES, open_folder, walk
from softlabel.dataset.parquet import ParquetSource
from softlabel.dataset.wrapped import DatasetSource, open_digits, open_torchvision
from softlabel.errors import DataError, SpecError
from softlabel.spec import split_options

PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})


def open_source(
    source: "str | os.PathLike[str] | Source | Any",
    *,
    key_fn: Callable[[int], str] | None = None,
    ignore_labels: bool = False,
) -> Source:
    """Open a dataset by the words of SOURCE, or wrap a map-style `torch.utils.data.Dataset`.

    Args:
        source: SOURCE, a path, a `Source` (given back as it is) or anything with `__len__` and `__getitem__` whose
            items are an image, (image, label) or a dict with `image` and `label`.
        key_fn: for such a dataset alone: the key of the sample at an index. Without it the key is the index.
        ignore_labels: treat every sample as unlabelled.

    Raises:
        SpecError: SOURCE cannot be understood, or there is nothing there.
        DataError: what is there cannot be used, such as two samples with one key.
    """
    if isinstance(source, str | os.PathLike):
        if key_fn is not None:
            raise SpecError(
                f"{source}: a key_fn goes with a Dataset object alone; a file's keys are named with '?key='"
            )
        return _open_named(os.fspath(source), ignore_labels)
    if isinstance(source, Source):
        if key_fn is not None:
            raise SpecError(f"{source.name}: a key_fn goes with a Dataset object alone; this source has its keys")
        return PartSource(source, ignore_labels=True) if ignore_labels else source
    return DatasetSource(source, key_fn=key_fn, ignore_labels=ignore_labels)


def _open_named(text: str, ignore_labels: bool) -> Source:
    name, options = (text, {}) if os.path.exists(text) else split_options(text, subject=text)
    rows = options.pop("rows", None)
    if name == "digits":
        source: Source = open_digits(text, ignore_labels)
    elif name.startswith("torchvision:"):
        source, options = open_torchvision(text, name.removeprefix("torchvision:"), options, ignore_labels), {}
    elif "://" in name:
        raise SpecError(f"{text}: expected a local path, found a URL; download it first")
    else:
        source = _open_path(text, Path(name), options, ignore_labels)
    if options:
        raise SpecError(f"{text}: unknown option {', '.join(options)} for a source of kind {source.kind!r}")
    return source if rows is None else _part(source, rows)


def _open_path(text: str, path: Path, options: dict[str, str], ignore_labels: bool) -> Source:
    if path.is_file():
        if path.suffix.lower() not in PARQUET_SUFFIXES:
            raise SpecError(f"{text}: expected a folder of images or a .parquet file, found {path.suffix or 'a'} file")
        return ParquetSource(path.parent, [path.name], options, name=text, ignore_labels=ignore_labels)
    if not path.is_dir():
        raise SpecError(
            f"{text}: expected a Parquet file, a folder, torchvision:NAME or digits; found no such file or folder"
        )
    images, tables, others = [], [], 0
    for found in walk(path):
        suffix = os.path.splitext(found)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(found)
        elif suffix in PARQUET_SUFFIXES:
            tables.append(found)
        else:
            others += 1
    pattern = options.pop("files", None)
    if pattern is not None:
        tables = [table for table in tables if fnmatch(table, pattern)]
        if not tables:
            raise SpecError(f"{text}: no Parquet file matches files={pattern}")
        images = []
    if tables and images:
        raise DataError(
            f"{text}: expected Parquet files or images, found {len(tables)} and {len(images)}; name the Parquet files "
            "with '?files=*.parquet', or the sub-folder of the images"
        )
    if tables:
        return ParquetSource(path, sorted(tables), options, name=text, ignore_labels=ignore_labels)
    if not images:
        raise DataError(
            f"{text}: expected images or Parquet files, found {others} other files; images end in "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    if ignore_labels:
        options["labels"] = "none"
    return open_folder(path, images, text, options)


def _part(source: Source, rows: str) -> Source:
    start, colon, stop = rows.partition(":")
    try:
        first, last = int(start or 0), int(stop) if stop else None
    except ValueError:
        first, last = -1, None
    if not colon or first < 0 or (last is not None and last < first):
        raise SpecError(f"{source.name}: rows: expected START:STOP with START <= STOP, found {rows!r}")
    return PartSource(source, first, last)
