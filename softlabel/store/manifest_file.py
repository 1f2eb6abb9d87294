"""The bytes of manifest.json and of segments: encoding, checking, decoding. Nothing here touches a file.

The root ends in a checksum of itself: xxh3-128 over the file's own bytes with the 32 digits of the checksum replaced
by zeros. Segments need none, the root names their hash. So one flipped bit anywhere is noticed.
"""

import json
import re

import xxhash

from softlabel.errors import StoreCorruptError, StoreError
from softlabel.store.manifest import FORMAT_NAME, FORMAT_VERSIONS, Manifest, Segment, SegmentRef
from softlabel.store.strict_json import SchemaError, dumps, from_json, loads, to_json

_ZEROS = b"0" * 32
_TAIL = re.compile(rb'"checksum": "([0-9a-f]{32})"\n\}\n\Z')
_REMEDY = "copy it again from where it came from, or write the store again"
_SEGMENT_REMEDY = "run 'softlabel repair' on the store, which finds its shards again"


def encode_root(manifest: Manifest) -> bytes:
    body = json.dumps(to_json(manifest), indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    raw = f'{body},\n "checksum": "{_ZEROS.decode()}"\n}}\n'.encode()
    return raw[:-36] + xxhash.xxh3_128_hexdigest(raw).encode() + raw[-4:]


def decode_root(raw: bytes, where: str) -> Manifest:
    """Raises StoreCorruptError (damaged or hostile) or StoreError (another format or version)."""
    found = _TAIL.search(raw[-64:])
    if found is None:
        raise StoreCorruptError(f"{where}: expected a checksum in its last line, found none; {_REMEDY}")
    position = len(raw) - len(raw[-64:]) + found.start(1)
    expected = xxhash.xxh3_128_hexdigest(raw[:position] + _ZEROS + raw[position + 32 :])
    if found[1].decode() != expected:
        raise StoreCorruptError(f"{where}: checksum says {found[1].decode()}, its bytes give {expected}; {_REMEDY}")
    try:
        value = loads(raw)
        if not isinstance(value, dict) or value.get("format") != FORMAT_NAME:
            raise SchemaError(f"expected format {FORMAT_NAME!r}")
        if (version := value.get("format_version")) not in FORMAT_VERSIONS:
            listed = " and ".join(map(str, FORMAT_VERSIONS))
            raise StoreError(
                f"{where}: format version {str(version)[:20]}, this softlabel reads {listed}; "
                "read it with the softlabel that wrote it, or upgrade"
            )
        del value["checksum"]
        return from_json(Manifest, value)
    except SchemaError as error:
        raise StoreCorruptError(f"{where}: {error}; {_REMEDY}") from None


def encode_segment(segment: Segment) -> bytes:
    return dumps(to_json(segment))


def decode_segment(raw: bytes, ref: SegmentRef, where: str) -> Segment:
    """Raises StoreCorruptError unless `raw` is what `ref` promises."""
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
