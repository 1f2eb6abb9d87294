"""Encode, check and decode the bytes of manifest.json and of segments.

The root ends in a checksum: xxh3-128 over its bytes with the 32 digits of the checksum replaced by zeros. The root
lists the hashes of segments. One flipped bit anywhere is detected.
"""

import json
import re

import xxhash

from softlabel.errors import StoreCorruptError, StoreError
from softlabel.store.file_refs import SegmentRef
from softlabel.store.manifest import FORMAT_VERSIONS, Manifest, Segment
from softlabel.store.strict_json import SchemaError, dumps, from_json, loads, to_json

FORMAT_NAME = "softlabel-store"
_ZEROS = b"0" * 32
_TAIL = re.compile(rb'"checksum": "([0-9a-f]{32})"\n\}\n\Z')
_REMEDY = "restore the file from a copy, or generate the store again"
_SEGMENT_REMEDY = "run 'softlabel repair' on the store, which rebuilds it from the shards"


def encode_root(manifest: Manifest) -> bytes:
    body = json.dumps(to_json(manifest), indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    raw = f'{body},\n "checksum": "{_ZEROS.decode()}"\n}}\n'.encode()
    return raw[:-36] + xxhash.xxh3_128_hexdigest(raw).encode() + raw[-4:]


def decode_root(raw: bytes, where: str) -> Manifest:
    """Decode the root, named `where` in errors.

    Raises:
        StoreCorruptError: it is damaged or invalid.
        StoreError: it has another format version.
    """
    found = _TAIL.search(raw[-64:])
    if found is None:
        raise StoreCorruptError(f"{where}: expected a checksum in the last line, found none; {_REMEDY}")
    position = len(raw) - len(raw[-64:]) + found.start(1)
    expected = xxhash.xxh3_128_hexdigest(raw[:position] + _ZEROS + raw[position + 32 :])
    if found[1].decode() != expected:
        raise StoreCorruptError(f"{where}: checksum expected {found[1].decode()}, found {expected}; {_REMEDY}")
    try:
        value = loads(raw)
        if not isinstance(value, dict) or value.get("format") != FORMAT_NAME:
            raise SchemaError(f"expected format {FORMAT_NAME!r}")
        if (version := value.get("format_version")) not in FORMAT_VERSIONS:
            *others, last = map(str, FORMAT_VERSIONS)
            raise StoreError(
                f"{where}: format version: expected {', '.join(others)} or {last}, found {str(version)[:20]}; "
                "use the softlabel that wrote it, or upgrade"
            )
        del value["checksum"]
        return from_json(Manifest, value)
    except SchemaError as error:
        raise StoreCorruptError(f"{where}: {error}; {_REMEDY}") from None


def encode_segment(segment: Segment) -> bytes:
    return dumps(to_json(segment))


def decode_segment(raw: bytes, ref: SegmentRef, where: str) -> Segment:
    """Decode a segment, named `where` in errors.

    Raises:
        StoreCorruptError: `raw` does not match `ref`, or is invalid.
    """
    found = xxhash.xxh3_128_hexdigest(raw)
    if len(raw) != ref.bytes or found != ref.xxh3:
        raise StoreCorruptError(
            f"{where}: expected {ref.bytes} bytes with xxh3 {ref.xxh3}, found {len(raw)} with {found}; "
            f"{_SEGMENT_REMEDY}"
        )
    try:
        segment = from_json(Segment, loads(raw))
    except SchemaError as error:
        raise StoreCorruptError(f"{where}: {error}; {_SEGMENT_REMEDY}") from None
    if len(segment.shards) != ref.shards:
        raise StoreCorruptError(
            f"{where}: expected {ref.shards} shards, found {len(segment.shards)}; {_SEGMENT_REMEDY}"
        )
    return segment
