"""Which files a SOURCE means: one, a folder, braces `data-{000..127}.tar` or a glob `data-*.tar`; here or at URLs.

Braces keep the order in which they are written; a glob and a folder give their files sorted by name. Either is the same
on every machine, so the order of the samples is a promise.
"""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from softlabel.dataset.findings import count_suffixes
from softlabel.dataset.image_folder import walk
from softlabel.dataset.storage import Files, LocalFiles, join_url, split_url
from softlabel.dataset.storage_fsspec import RemoteFiles, found_below, look
from softlabel.dataset.suffixes import IMAGE_SUFFIXES
from softlabel.errors import DataError, SpecError

PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
TAR_SUFFIXES = frozenset({".tar"})
_ARCHIVES = frozenset({".zip", ".7z", ".rar"})
_PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|Z))$", re.IGNORECASE)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# A slip such as {0..999999999} must not fill the memory with names.
_MOST_NAMES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What was found: shards of one kind ("parquet" or "tar"), or the paths of image files ("images").

    Attributes:
        others: files beside the images that are none.
        skipped: hidden and system files and folders beside them.
    """

    kind: str
    files: Files
    images: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def is_url(name: str) -> bool:
    return "://" in name and not name.startswith("file://")


def is_pattern(name: str) -> bool:
    return any(sign in name for sign in "{*[")


def list_source(name: str, options: dict[str, str], *, subject: str) -> Listing:
    """The files that `name` means; takes ``files=GLOB`` out of the options. `subject` is what an error is about.

    Raises:
        SpecError: nothing there that can be read, or the words cannot be understood.
        DataError: files of several kinds.
    """
    wanted = options.pop("files", None)
    if is_pattern(name) and not (not is_url(name) and os.path.exists(name)):
        if wanted is not None:
            raise SpecError(f"{subject}: give a pattern or files=, not both")
        root, names = _expanded(name, subject)
        return _of_one_kind(root, names, subject, sizes=_sizes(root, names, subject))
    if is_url(name):
        return _at_url(name, wanted, subject)
    if os.path.isfile(name):
        if wanted is not None:
            raise SpecError(f"{subject}: files= chooses among the files of a folder, found a file; leave it out")
        return _of_one_kind(os.path.dirname(name), [os.path.basename(name)], subject)
    if not os.path.isdir(name):
        raise SpecError(
            f"{subject}: expected a file or folder, a URL, torchvision:NAME or digits; found no such file or folder"
        )
    skipped: list[str] = []
    return _chosen(name, list(walk(Path(name), skipped=skipped)), wanted, subject, skipped=skipped)


def _at_url(url: str, wanted: str | None, subject: str) -> Listing:
    if wanted is None:
        is_file, size = look(url)
        if is_file:
            root, name = split_url(url)
            return _of_one_kind(root, [name], subject, sizes=[size])
    sizes = found_below(url)
    found = _chosen(url, list(sizes), wanted, subject, sizes=sizes)
    if found.kind == "images":
        raise SpecError(
            f"{subject}: expected .parquet or .tar files, found {len(found.images)} single images: each would cost a "
            "request; pack them into tar shards, or copy them here"
        )
    return found


def _chosen(
    root: str,
    names: Sequence[str],
    wanted: str | None,
    subject: str,
    *,
    sizes: dict[str, int] | None = None,
    skipped: Sequence[str] = (),
) -> Listing:
    """Those files of a folder that are the data."""
    shards = [name for name in names if _suffix(name) in PARQUET_SUFFIXES | TAR_SUFFIXES]
    images = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
    packed = next((name for name in names if _PACKED.search(name)), None)
    if wanted is not None:
        shards, images, packed = [name for name in shards if fnmatchcase(name, wanted)], [], None
        if not shards:
            raise SpecError(f"{subject}: no Parquet or tar file matches files={wanted}")
    if packed is not None:
        raise _is_packed(subject, packed)
    tables, tars = ([name for name in shards if _suffix(name) in some] for some in (PARQUET_SUFFIXES, TAR_SUFFIXES))
    counts = {"Parquet": len(tables), "tar": len(tars), "image": len(images)}
    found = [f"{count} {kind}" for kind, count in counts.items() if count]
    if len(found) > 1:
        raise DataError(
            f"{subject}: expected Parquet files, tar files or images, found {' and '.join(found)} files; choose with "
            "'?files=*.parquet' or '?files=*.tar', or name the sub-folder of the images"
        )
    if not found:
        raise SpecError(
            f"{subject}: expected images, Parquet or tar files, found {len(names)} other files"
            f"{f' ({count_suffixes(names)})' if names else ''}{_unpack(names)}; images end in "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    if images:
        others = sorted(set(names) - set(images))
        return Listing(
            kind="images",
            files=LocalFiles(root, []),
            images=tuple(images),
            others=tuple(others),
            skipped=tuple(skipped),
        )
    chosen = sorted(shards)
    return _of_one_kind(root, chosen, subject, sizes=None if sizes is None else [sizes[name] for name in chosen])


def _of_one_kind(root: str, names: Sequence[str], subject: str, *, sizes: Sequence[int] | None = None) -> Listing:
    packed = next((name for name in names if _PACKED.search(name)), None)
    if packed is not None:
        raise _is_packed(subject, packed)
    suffixes = {_suffix(name) for name in names}
    kind = "parquet" if suffixes <= PARQUET_SUFFIXES else "tar" if suffixes <= TAR_SUFFIXES else None
    if kind is None:
        found = " and ".join(f"a {suffix} file" if suffix else "a file without a suffix" for suffix in sorted(suffixes))
        raise SpecError(
            f"{subject}: expected .parquet or .tar files, a folder of images, .h5, .npy, .npz, or a list as .txt or "
            f".csv; found {found}{_unpack(names)}"
        )
    if is_url(root):
        assert sizes is not None
        return Listing(kind=kind, files=RemoteFiles(root, names, sizes))
    return Listing(kind=kind, files=LocalFiles(root, names))


def _is_packed(subject: str, name: str) -> SpecError:
    return SpecError(
        f"{subject}: expected plain tar files, found {name}: a sample in a compressed one cannot be reached without "
        "unpacking all before it, and images hardly shrink; unpack it once (gunzip, unxz, zstd -d)"
    )


def _unpack(names: Sequence[str]) -> str:
    """What to do about archives that are not read."""
    archive = next((name for name in names if _suffix(name) in _ARCHIVES), None)
    return "" if archive is None else f"; unpack {archive!r} into a folder and give that"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# ---- patterns ----


def _expanded(pattern: str, subject: str) -> tuple[str, list[str]]:
    """The root, which has no signs of a pattern in it, and the names below it."""
    pattern, sign, archive = pattern.partition("::") if is_url(pattern) else (pattern, "", "")
    if is_pattern(archive) or (sign and "://" not in pattern):
        raise SpecError(
            f"{subject}: expected a pattern in the first path of a chain alone; name the archives one by one"
        )
    fixed = re.split(r"[{*\[]", pattern, maxsplit=1)[0]
    root, slash, _ = fixed.rpartition("/")
    inner = braces(pattern[len(root) + len(slash) :], subject)
    # "/data-{0..1}.tar" lies in "/"; s3://bucket is a root, s3:/ none, and zip:// is the whole archive.
    root = root or slash
    if root.endswith(":/"):
        if not archive:
            raise SpecError(f"{subject}: the bucket or host cannot be part of a pattern")
        root += "/"
    root += sign + archive
    if not any(sign in name for name in inner for sign in "*["):
        return root, inner
    if is_url(pattern):
        there = list(found_below(root))
    elif os.path.isdir(root or "."):
        there = list(walk(Path(root or ".")))
    else:
        there = []
    names: list[str] = []
    for one in inner:
        depth = one.count("/")
        found = sorted(name for name in there if name.count("/") == depth and fnmatchcase(name, one))
        if not found:
            raise SpecError(f"{subject}: no file matches {one} in {root or 'this folder'}")
        names += found
    return root, names


def _sizes(root: str, names: Sequence[str], subject: str) -> list[int] | None:
    """Sizes of the files at a URL; of local ones it is enough that they are there."""
    if is_url(root):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(16) as pool:
            looked = list(pool.map(lambda name: look(join_url(root, name)), names))
        absent = [name for name, (is_file, _) in zip(names, looked, strict=True) if not is_file]
    else:
        looked, absent = [], [name for name in names if not os.path.isfile(os.path.join(root, name))]
    if absent:
        raise SpecError(
            f"{subject}: {len(absent)} of the {len(names)} files are not there: {', '.join(absent[:3])}; mend it"
        )
    return [size for _, size in looked] if is_url(root) else None


def braces(pattern: str, subject: str) -> list[str]:
    """``a-{00..02}.tar`` and ``{train,val}.tar`` as a shell expands them, leading zeros kept.

    Raises:
        SpecError: a brace that does not close, or more than a million names.
    """
    parts: list[list[str]] = []
    for text, inside in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        if text:
            parts.append([text])
        elif found := _RANGE.fullmatch(inside):
            first, last = int(found[1]), int(found[2])
            if abs(last - first) >= _MOST_NAMES:
                raise SpecError(f"{subject}: {{{inside}}} are more than {_MOST_NAMES:,} names")
            width = len(found[1]) if found[1].startswith("0") or len(found[1]) == len(found[2]) else 0
            step = 1 if last >= first else -1
            parts.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        else:
            parts.append(inside.split(","))
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", pattern)):
        raise SpecError(f"{subject}: a brace does not close, or one stands within another")
    names = ["".join(chosen) for chosen in itertools.islice(itertools.product(*parts), _MOST_NAMES + 1)]
    if len(names) > _MOST_NAMES:
        raise SpecError(f"{subject}: the braces give more than {_MOST_NAMES:,} names")
    return names
