"""File suffixes of images and of lists of images."""

_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif .mpo"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
# Image formats that the decoder does not read.
_FOREIGN = ".heic .heif .jxl .svg .psd .ico .tga .dds .exr .hdr .jxr .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .eps .dcm"
FOREIGN_SUFFIXES = frozenset(_FOREIGN.split())
LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".jsonl"})


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case; empty for `.hidden` and `name`."""
    base = name.rpartition("/")[2]
    stem, dot, suffix = base.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""
