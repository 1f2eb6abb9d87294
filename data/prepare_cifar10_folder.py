"""Write the images of a Parquet file in the Hugging Face layout as a folder of class folders.

    python data/prepare_cifar10_folder.py ../shared/data/cifar10-jpeg/test.parquet data/cifar10-test

An image becomes CLASS/NAME with its bytes unchanged; NAME is the last part of its key. A run that was interrupted, or
is repeated, writes what is missing and leaves the rest; a file with other content is an error and not overwritten.
"""

import argparse
import os
import sys
from pathlib import Path

from softlabel.dataset import Source, open_source
from softlabel.errors import DataError, SoftLabelError

BATCH = 1024


def prepare(source: Source, out: Path) -> tuple[int, int]:
    """Write the images of a source into class folders.

    Returns:
        How many files were written, and how many were there already.

    Raises:
        DataError: an image without a class, two images with one name, or a file of another content in the way.
    """
    names = source.class_names
    if names is None or not source.has_labels:
        raise DataError(f"{source.name}: expected labels with class names, found none; a folder needs classes")
    for name in names:
        (out / name).mkdir(parents=True, exist_ok=True)
    written = present = 0
    paths: set[Path] = set()
    for start in range(0, len(source), BATCH):
        for sample in source.read(range(start, min(start + BATCH, len(source)))):
            if sample.label < 0 or not isinstance(sample.raw, bytes):
                raise DataError(f"{source.name}: {sample.key!r}: expected a label and encoded bytes, found none")
            path = out / names[sample.label] / sample.key.rpartition("/")[2]
            if path in paths:
                raise DataError(f"{source.name}: two images would be {path}; their keys differ in folders alone")
            paths.add(path)
            if not path.exists():
                # The name appears with the whole content or not at all: a rerun trusts what it finds.
                partial = path.with_name(f".{path.name}.part")
                partial.write_bytes(sample.raw)
                os.replace(partial, path)
                written += 1
            elif path.read_bytes() == sample.raw:
                present += 1
            else:
                raise DataError(f"{path}: is there with other content; remove it, or choose another folder")
    return written, present


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Parquet file or folder in the Hugging Face image layout")
    parser.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    try:
        written, present = prepare(open_source(arguments.source), arguments.out)
    except SoftLabelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.out}: {written} images written, {present} were there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
