"""The files that a manifest's root names beside the shards: their patterns, sizes and hashes."""

import re
from dataclasses import dataclass

SEGMENT_LIMIT = 32 << 20
SEGMENT_FILE = re.compile(r"segments/([0-9]{5,12})-([0-9a-f]{32})\.json")
EXTRA_FILE = re.compile(r"extra/([a-z][a-z0-9_]{0,31})-([0-9a-f]{32})\.(safetensors|json)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRef:
    """A segment in the root."""

    file: str
    shards: int
    bytes: int
    xxh3: str

    def __post_init__(self) -> None:
        found = SEGMENT_FILE.fullmatch(self.file)
        if not found or found[2] != self.xxh3:
            raise ValueError(f"file: expected segments/<number>-<xxh3>.json, found {self.file[:80]!r}")
        if not 0 <= self.bytes <= SEGMENT_LIMIT:
            raise ValueError(f"bytes: expected at most {SEGMENT_LIMIT}, found {self.bytes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraRef:
    """A file written once per store: arrays as safetensors (a teacher's head), or JSON (its tokenizer)."""

    file: str
    bytes: int
    xxh3: str

    def __post_init__(self) -> None:
        found = EXTRA_FILE.fullmatch(self.file)
        if not found or found[2] != self.xxh3:
            raise ValueError(f"file: expected extra/<name>-<xxh3>.safetensors or .json, found {self.file[:80]!r}")
