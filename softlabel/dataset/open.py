"""SOURCE: the syntax that names a dataset.

    FILE.parquet[?image=COLUMN&label=COLUMN|none&key=COLUMN|index&classes=FILE]
                                        Hugging Face image layout
    FILE.parquet?inputs=COLUMN[,COLUMN...]|*[&label=COLUMN|none&labels=COLUMN,COLUMN...&key=COLUMN]
                                        a table: the numbers of these columns side by side, or one column of lists; `*`
                                        are all columns of numbers but key and labels. FILE.csv and .tsv likewise
    FILE.parquet?text=COLUMN[&text_pair=COLUMN&label=COLUMN|none&key=COLUMN|index&classes=FILE]
                                        texts, or pairs of them; FILE.csv, .tsv and .jsonl likewise. A Parquet file
                                        without images whose column is called text needs no word, nor does such a .jsonl
    FILE.parquet?messages=COLUMN[&key=COLUMN|index]
                                        chats, lists of {role, content}, for language models; FILE.jsonl likewise. A
                                        file whose column is called messages needs no word
    FILE.parquet?tokens=COLUMN[&mask=COLUMN&key=COLUMN|index]
                                        lists of token ids, and which tokens count (0 or 1); FILE.jsonl likewise. Of
                                        documents, id=COLUMN means key=COLUMN
    FILE.tar[?image=EXT&label=FIELD|.EXT|none&labels=FIELD,FIELD...&key=shard|index&classes=FILE]
                                        a WebDataset shard: the label is `.cls`, FIELD of `.json`, or the member `.EXT`
    FILE.h5[?images=NAME&labels=NAME|none&keys=NAME&classes=FILE]      uint8 arrays in HDF5; FILE.npz likewise
    FILE.npy[?labels=FILE.npy&keys=FILE.npy&classes=FILE]              a uint8 array
    FILE.h5?inputs=NAME[&layout=channels-first|channels-last&...]      numbers of any type and shape, with a layout
                                        images of 1 to 64 bands; FILE.npz likewise, FILE.npy with inputs=x
    FILE.txt, .csv, .tsv or .jsonl[?root=FOLDER&image=COLUMN&label=COLUMN|none&labels=COLUMN,COLUMN...&classes=FILE]
                                        a list of image files, PATH[,LABEL] a line, or columns with a heading
    FOLDER[?labels=folders|none&classes=FILE]
                                        a folder of images (see `folder.open_folder`)
    FOLDER[?files=GLOB&...]             a folder of Parquet or tar files, in the order of their names
    data-{000..127}.tar[?...]           several Parquet or tar files, in this order; or a glob, data-*.tar, by name
    PROTOCOL://PATH[?...]               Parquet or tar files behind a URL that fsspec knows (s3, gs, https, file, ...):
                                        one, a folder of them, braces or a glob
    torchvision:NAME?root=...&train=true    any class of torchvision.datasets, with its arguments
    digits                              scikit-learn's handwritten digits, 8x8 grey

`rows=START:STOP` selects a part of any source, `fold=K/N` or `without_fold=K/N` (and `fold_seed=`) samples by a hash of
their keys, `labelled=only` those with a hard label. `exif=ignore` ignores the EXIF orientation, `bits=N` is the number
of bits that 16-bit images use. Paths in options are relative to the working folder, those in a list to its folder. A
`?` in a path or URL is written `%3F`, unless the path exists as written. `~` is expanded.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softlabel.common.spec import split_options
from softlabel.dataset.arrays import ARRAY_SUFFIXES, ArraySource
from softlabel.dataset.concat import SeveralSources
from softlabel.dataset.csv_table import CsvTableSource
from softlabel.dataset.decoding import DecodedSource, read_decoding
from softlabel.dataset.discover import is_url, list_source
from softlabel.dataset.documents import peek_documents
from softlabel.dataset.file_list import open_list
from softlabel.dataset.folds import choose_samples, read_choice
from softlabel.dataset.image_folder import open_folder
from softlabel.dataset.options import ARRAY, FOLDER, PARQUET, ROWS, TAR, check_form, check_options, name_keys
from softlabel.dataset.parquet import ParquetSource
from softlabel.dataset.source import Source
from softlabel.dataset.subset import PartSource
from softlabel.dataset.suffixes import LIST_SUFFIXES
from softlabel.dataset.text import FORMS, TextFileSource
from softlabel.dataset.torch_dataset import DatasetSource, open_digits, open_torchvision
from softlabel.dataset.webdataset import TarSource
from softlabel.errors import SpecError
from softlabel.inputs.base import AS_USUAL, Decoding
from softlabel.inputs.image_decode import IMAGES


def open_source(
    source: "str | os.PathLike[str] | Source | list[str] | Any",
    *,
    key_fn: Callable[[int], str | int] | None = None,
    ignore_labels: bool = False,
    check_keys: bool = True,
) -> Source:
    """Open a SOURCE, or wrap a map-style `torch.utils.data.Dataset`.

    Args:
        source: a SOURCE, a path, a `Source` (returned as it is) or an object with `__len__` and `__getitem__` whose
            items are an image, (image, label) or a dict with `image` and `label`. A list of the first three is
            concatenated.
        key_fn: index -> key, only for such an object; by default the key is the index.
        ignore_labels: treat every sample as unlabelled.
        check_keys: read all keys if they may repeat, and raise if they do; False if they were checked before.

    Raises:
        SpecError: the SOURCE is malformed or does not exist.
        DataError: the data cannot be used, for example because two samples have the same key.
    """
    if isinstance(source, str | os.PathLike):
        if key_fn is not None:
            raise SpecError(f"{source}: key_fn is only for a Dataset object; choose a file's keys with '?key='")
        return _open_named(os.fspath(source), ignore_labels, check_keys)
    if isinstance(source, list) and source and all(isinstance(one, str | os.PathLike | Source) for one in source):
        return SeveralSources(
            [open_source(one, key_fn=key_fn, ignore_labels=ignore_labels, check_keys=check_keys) for one in source]
        )
    if isinstance(source, Source):
        if key_fn is not None:
            raise SpecError(f"{source.name}: key_fn is only for a Dataset object; this source has keys")
        return PartSource(source, ignore_labels=True) if ignore_labels else source
    return _check_keys(DatasetSource(source, key_fn=key_fn, ignore_labels=ignore_labels), check_keys)


def _check_keys(source: Source, check_keys: bool) -> Source:
    if check_keys and source.maybe_repeated_keys:
        source.fingerprint()
    return source


def _open_named(text: str, ignore_labels: bool, check_keys: bool) -> Source:
    plain = os.path.expanduser(text)
    name, options = (plain, {}) if os.path.exists(plain) else split_options(text, subject=text)
    rows, decoding = options.pop("rows", None), read_decoding(options, subject=text)
    choice = read_choice(options, subject=text)
    if name == "digits":
        check_options(options, (), "digits", subject=text)
        source: Source = open_digits(text, ignore_labels)
    elif name.startswith("torchvision:"):
        source = open_torchvision(text, name.removeprefix("torchvision:"), options, ignore_labels)
    else:
        source = _open_files(text, name.removeprefix("file://"), options, ignore_labels)
    source = _check_keys(_set_decoding(source, decoding), check_keys)
    source = source if rows is None else _take_rows(source, rows)
    return source if choice is None else choose_samples(source, choice, name=text)


def _set_decoding(source: Source, decoding: Decoding) -> Source:
    if decoding == AS_USUAL:
        return source
    if source.kind in ("array", "digits") or source.inputs != IMAGES:
        raise SpecError(f"{source.name}: exif= and bits= are for encoded images, these are numbers; leave them out")
    if isinstance(source, DatasetSource) and not decoding.upright:
        raise SpecError(f"{source.name}: exif= is for encoded images, this dataset decodes by itself; leave it out")
    return DecodedSource(source, decoding)


def _open_files(text: str, name: str, options: dict[str, str], ignore_labels: bool) -> Source:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in ARRAY_SUFFIXES | LIST_SUFFIXES:
        if is_url(name):
            raise SpecError(f"{text}: expected .parquet or .tar files behind a URL, found {suffix}; download it first")
        if os.path.isfile(name):
            return _open_one_file(text, name, suffix, options, ignore_labels)
    found = list_source(name, options, subject=text)
    if found.kind == "parquet":
        if not options.keys() & {"image", "inputs"}:
            name_keys(options, subject=text)
        check_options(options, PARQUET, "a Parquet file", subject=text)
        return ParquetSource(found.files, options, name=text, ignore_labels=ignore_labels)
    if found.kind == "tar":
        check_options(options, TAR, "a tar file", subject=text)
        return TarSource(found.files, options, name=text, ignore_labels=ignore_labels)
    check_options(options, FOLDER, "a folder of images", subject=text)
    return open_folder(
        Path(name), found.images, text, options, others=found.others, skipped=found.skipped, ignore_labels=ignore_labels
    )


def _open_one_file(text: str, name: str, suffix: str, options: dict[str, str], ignore_labels: bool) -> Source:
    """Open a file of arrays, or one with a line for each sample."""
    if suffix in ARRAY_SUFFIXES:
        check_options(options, ARRAY, f"a {suffix} file", subject=text)
        return ArraySource(name, options, name=text, ignore_labels=ignore_labels)
    if suffix == ".jsonl" and not options.keys() & {"image", "root", "inputs", *FORMS}:
        options.update(peek_documents(name) or {})
    if options.keys() & set(FORMS):
        name_keys(options, subject=text)
    check_options(options, ROWS, f"a {suffix} file", subject=text)
    check_form(options, subject=text)
    if "inputs" in options:
        return CsvTableSource(name, options, name=text, ignore_labels=ignore_labels)
    if options.keys() & set(FORMS):
        return TextFileSource(name, options, name=text, ignore_labels=ignore_labels)
    return open_list(name, options, name=text, ignore_labels=ignore_labels)


def _take_rows(source: Source, rows: str) -> Source:
    start, colon, stop = rows.partition(":")
    try:
        first, last = int(start or 0), int(stop) if stop else None
    except ValueError:
        first, last = -1, None
    if not colon or first < 0 or (last is not None and last < first):
        raise SpecError(f"{source.name}: rows: expected START:STOP with START <= STOP, found {rows!r}")
    return PartSource(source, first, last)
