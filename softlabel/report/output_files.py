"""Where a report is written: never over the stores, the runs and the data that it is about."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabel.common.spec import split_options
from softlabel.dataset import Source
from softlabel.dataset.discover import is_pattern, is_url, list_source
from softlabel.dataset.suffixes import IMAGE_SUFFIXES, LIST_SUFFIXES
from softlabel.errors import SoftLabelError, UsageError
from softlabel.report.runs import find_run_folders
from softlabel.store.reader import Store
from softlabel.training.run_folder import STUDENTS

_ROOTS = ("root", "classes", "labels", "keys")  # options of a SOURCE that name a file or a folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A file, or a folder with all that is in it, that a report must not replace or add to.

    Attributes:
        path: resolved.
        what: in words, with the place as it was given.
    """

    path: Path
    what: str

    def holds(self, file: Path) -> bool:
        """Whether a resolved path is this file, or lies in this folder."""
        return file == self.path or self.path in file.parents


def check_outputs(outputs: Mapping[str, str | Path | None], kept: Iterable[Kept]) -> None:
    """Check where files are to be written, before anything is measured.

    Args:
        outputs: option -> its file.
        kept: what is not to be touched.

    Raises:
        UsageError: two are the same, one is a folder, its folder does not exist, or it is something to be kept.
    """
    files = {option: Path(path).resolve() for option, path in outputs.items() if path is not None}
    if len(set(files.values())) < len(files):
        raise UsageError(f"{_list_words(list(outputs))}: expected different files, found one twice; choose other names")
    kept = tuple(kept)
    for option, file in files.items():
        if file.is_dir():
            raise UsageError(f"{file}: expected a file to write, found a folder; add a name")
        if not file.parent.is_dir():
            raise UsageError(f"{file}: its folder does not exist; create it first")
        for one in kept:
            if one.holds(file):
                raise UsageError(
                    f"{option} {outputs[option]}: expected a place outside of what the report is about, found one in "
                    f"{one.what}; choose another place"
                )


def keep_store(store: str | Path | Store | None) -> Iterator[Kept]:
    """Yield the folder of a store, or of the runs that are given in its place."""
    if store is None:
        return
    text = store.url if isinstance(store, Store) else os.path.expanduser(os.fspath(store))
    folder = Path(text.removeprefix("file://"))
    if "://" in text and not text.startswith("file://"):
        return
    if (folder / "manifest.json").is_file():
        yield Kept(path=folder.resolve(), what=f"the store {text}")
    else:
        yield from keep_runs([folder])


def keep_runs(runs: Sequence[str | Path]) -> Iterator[Kept]:
    """Yield the folders of runs; that of several students is one of them, that of other folders is not."""
    for given in runs:
        if not (folder := Path(given).expanduser()).is_dir():
            continue  # is reported where the runs are read
        for run in find_run_folders(folder):
            yield Kept(path=run.resolve(), what=f"the run {run}")
            if (run.parent / STUDENTS).is_file():
                yield Kept(path=run.parent.resolve(), what=f"the folder of students {run.parent}")


def keep_data(data: Any) -> Iterator[Kept]:
    """Yield the local files and folders of a SOURCE, or of several."""
    if isinstance(data, list | tuple):
        for one in data:
            yield from keep_data(one)
        return
    if isinstance(data, Source):
        for part in data.parts():
            yield from _keep_named(part.name)
    elif isinstance(data, str | os.PathLike):
        yield from _keep_named(os.fspath(data))


def _keep_named(text: str) -> Iterator[Kept]:
    plain, what = os.path.expanduser(text), f"the data {text}"
    try:
        head, options = (plain, {}) if os.path.exists(plain) else split_options(text, subject=text)
    except SoftLabelError:
        return  # is reported where the data is opened
    head = head.removeprefix("file://")
    for place in (head, *(options[name] for name in _ROOTS if name in options)):
        if place != "digits" and os.path.exists(place) and not is_url(place):
            yield Kept(path=Path(place).resolve(), what=what)
    if os.path.isfile(head) and os.path.splitext(head)[1].lower() in LIST_SUFFIXES:
        # The images of a list lie somewhere below it; other files there are none of its data.
        yield _Images(path=Path(head).resolve().parent, what=what)
    if is_pattern(head) and not is_url(head) and not os.path.exists(head):
        with suppress(SoftLabelError, OSError):
            files = list_source(head, {}, subject=text).files
            yield from (Kept(path=Path(files.where(number)).resolve(), what=what) for number in range(len(files)))


class _Images(Kept):
    """The image files in a folder."""

    def holds(self, file: Path) -> bool:
        return self.path in file.parents and file.suffix.lower() in IMAGE_SUFFIXES


def _list_words(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
