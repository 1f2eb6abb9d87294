"""Find the files of a SOURCE: a file, a folder, braces `data-{000..127}.tar` or a glob `data-*.tar`; local or at URLs.

Braces keep their written order; a glob and a folder are sorted by name. So the order of samples is the same on every
machine.
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
# A mistake such as {0..999999999} must not exhaust memory.
_MOST_NAMES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of a SOURCE.

    Attributes:
        kind: "parquet", "tar" or "images".
        files: the shards, unless `kind` is "images".
        images: paths of image files.
        others: other files beside the images.
        skipped: hidden and system files and folders.
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
    """List the files of `name`; removes ``files=GLOB`` from the options. `subject` begins error messages.

    Raises:
        SpecError: no readable files, or a wrong pattern or option.
        DataError: files of several kinds.
    """
    wanted = options.pop("files", None)
    if is_pattern(name) and not (not is_url(name) and os.path.exists(name)):
        if wanted is not None:
            raise SpecError(f"{subject}: give a pattern or files=, not both")
        root, names = _expand_pattern(name, subject)
        return _list_one_kind(root, names, subject, sizes=_find_sizes(root, names, subject))
    if is_url(name):
        return _list_url(name, wanted, subject)
    if os.path.isfile(name):
        if wanted is not None:
            raise SpecError(f"{subject}: files= chooses among the files of a folder, found a file; leave it out")
        return _list_one_kind(os.path.dirname(name), [os.path.basename(name)], subject)
    if not os.path.isdir(name):
        raise SpecError(
            f"{subject}: expected a file or folder, a URL, torchvision:NAME or digits; found no such file or folder"
        )
    skipped: list[str] = []
    return _choose_files(name, list(walk(Path(name), skipped=skipped)), wanted, subject, skipped=skipped)


def _list_url(url: str, wanted: str | None, subject: str) -> Listing:
    if wanted is None:
        is_file, size = look(url)
        if is_file:
            root, name = split_url(url)
            return _list_one_kind(root, [name], subject, sizes=[size])
    sizes = found_below(url)
    found = _choose_files(url, list(sizes), wanted, subject, sizes=sizes)
    if found.kind == "images":
        raise SpecError(
            f"{subject}: expected .parquet or .tar files, found {len(found.images)} single images: each would cost a "
            "request; pack them into tar shards, or copy them here"
        )
    return found


def _choose_files(
    root: str,
    names: Sequence[str],
    wanted: str | None,
    subject: str,
    *,
    sizes: dict[str, int] | None = None,
    skipped: Sequence[str] = (),
) -> Listing:
    """Choose the data files of a folder."""
    shards = [name for name in names if _get_suffix(name) in PARQUET_SUFFIXES | TAR_SUFFIXES]
    images = [name for name in names if _get_suffix(name) in IMAGE_SUFFIXES]
    packed = next((name for name in names if _PACKED.search(name)), None)
    if wanted is not None:
        shards, images, packed = [name for name in shards if fnmatchcase(name, wanted)], [], None
        if not shards:
            raise SpecError(f"{subject}: no Parquet or tar file matches files={wanted}")
    if packed is not None:
        raise _make_packed_error(subject, packed)
    tables, tars = ([name for name in shards if _get_suffix(name) in some] for some in (PARQUET_SUFFIXES, TAR_SUFFIXES))
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
            f"{f' ({count_suffixes(names)})' if names else ''}{_suggest_unpacking(names)}; images end in "
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
    return _list_one_kind(root, chosen, subject, sizes=None if sizes is None else [sizes[name] for name in chosen])


def _list_one_kind(root: str, names: Sequence[str], subject: str, *, sizes: Sequence[int] | None = None) -> Listing:
    packed = next((name for name in names if _PACKED.search(name)), None)
    if packed is not None:
        raise _make_packed_error(subject, packed)
    suffixes = {_get_suffix(name) for name in names}
    kind = "parquet" if suffixes <= PARQUET_SUFFIXES else "tar" if suffixes <= TAR_SUFFIXES else None
    if kind is None:
        found = " and ".join(f"a {suffix} file" if suffix else "a file without a suffix" for suffix in sorted(suffixes))
        raise SpecError(
            f"{subject}: expected .parquet or .tar files, a folder of images, .h5, .npy, .npz, or a list as .txt or "
            f".csv; found {found}{_suggest_unpacking(names)}"
        )
    if is_url(root):
        assert sizes is not None
        return Listing(kind=kind, files=RemoteFiles(root, names, sizes))
    return Listing(kind=kind, files=LocalFiles(root, names))


def _make_packed_error(subject: str, name: str) -> SpecError:
    return SpecError(
        f"{subject}: expected plain tar files, found {name}, which has no random access; decompress it once (gunzip, "
        "unxz, zstd -d)"
    )


def _suggest_unpacking(names: Sequence[str]) -> str:
    archive = next((name for name in names if _get_suffix(name) in _ARCHIVES), None)
    return "" if archive is None else f"; unpack {archive!r} into a folder and give that"


def _get_suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# ---- patterns ----


def _expand_pattern(pattern: str, subject: str) -> tuple[str, list[str]]:
    """Return the root, which is not a pattern, and the names below it."""
    pattern, sign, archive = pattern.partition("::") if is_url(pattern) else (pattern, "", "")
    if is_pattern(archive) or (sign and "://" not in pattern):
        raise SpecError(
            f"{subject}: expected a pattern only in the first path of a chain; name the archives one by one"
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


def _find_sizes(root: str, names: Sequence[str], subject: str) -> list[int] | None:
    """Check that the files exist; return their sizes if they are at a URL."""
    if is_url(root):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(16) as pool:
            looked = list(pool.map(lambda name: look(join_url(root, name)), names))
        absent = [name for name, (is_file, _) in zip(names, looked, strict=True) if not is_file]
    else:
        looked, absent = [], [name for name in names if not os.path.isfile(os.path.join(root, name))]
    if absent:
        raise SpecError(
            f"{subject}: {len(absent)} of the {len(names)} files do not exist: {', '.join(absent[:3])}; fix the pattern"
        )
    return [size for _, size in looked] if is_url(root) else None


def braces(pattern: str, subject: str) -> list[str]:
    """Expand ``a-{00..02}.tar`` and ``{train,val}.tar`` like a shell, with leading zeros.

    Raises:
        SpecError: unbalanced or nested braces, or more than a million names.
    """
    parts: list[list[str]] = []
    for text, inside in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        if text:
            parts.append([text])
        elif found := _RANGE.fullmatch(inside):
            first, last = int(found[1]), int(found[2])
            if abs(last - first) >= _MOST_NAMES:
                raise SpecError(f"{subject}: {{{inside}}}: expected at most {_MOST_NAMES:,} names")
            width = len(found[1]) if found[1].startswith("0") or len(found[1]) == len(found[2]) else 0
            step = 1 if last >= first else -1
            parts.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        else:
            parts.append(inside.split(","))
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", pattern)):
        raise SpecError(f"{subject}: unbalanced or nested braces")
    names = ["".join(chosen) for chosen in itertools.islice(itertools.product(*parts), _MOST_NAMES + 1)]
    if len(names) > _MOST_NAMES:
        raise SpecError(f"{subject}: braces: expected at most {_MOST_NAMES:,} names")
    return names
