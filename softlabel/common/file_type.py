"""File types recognised by their first bytes, for error messages about a file of the wrong type."""

from pathlib import Path

_WRAPPED = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of git-lfs instead of the file itself; fetch it with 'git lfs pull'",
    ),
    (b"\x1f\x8b", "a file compressed by gzip; unpack it first"),
    (b"BZh", "a file compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "a file compressed by xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
)

_NO_CHECKPOINTS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?), not a PyTorch file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"GGUF", "a GGUF file, not a PyTorch file"),
)


def describe_content(path: Path) -> str | None:
    """Return the type of a file by its first bytes, with a remedy; None if unknown.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(512)
    found = describe_beginning(start) or _match_start(start, _NO_CHECKPOINTS)
    if found is not None:
        return found
    # safetensors: the length of a JSON header as 8 bytes, then the header.
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= path.stat().st_size - 8:
        return "a safetensors file"
    return None


def describe_beginning(start: bytes) -> str | None:
    """Return what the first 512 bytes show instead of the expected file, with a remedy; None if unknown."""
    if not start:
        return "an empty file (an interrupted download?)"
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page; download the file itself"
    return _match_start(start, _WRAPPED)


def _match_start(start: bytes, beginnings: tuple[tuple[bytes, str], ...]) -> str | None:
    return next((what for beginning, what in beginnings if start.startswith(beginning)), None)
