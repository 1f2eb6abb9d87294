"""The folder with real CIFAR-10 images and pretrained networks, which tests and benchmarks use where there is one."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find_shared_data() -> Path | None:
    """Return the folder that SOFTLABEL_DATA names, or the one beside the repository; None where it is incomplete."""
    folder = Path(os.environ.get("SOFTLABEL_DATA") or ROOT.parent / "shared" / "data")
    complete = (folder / "cifar10-jpeg" / "test.parquet").is_file() and (folder / "cifar10-resnets").is_dir()
    return folder.resolve() if complete else None


def require_shared_data() -> Path:
    """Return the folder for a program, which ends with a message where there is none."""
    folder = find_shared_data()
    if folder is None:
        sys.exit("no CIFAR-10 images; set SOFTLABEL_DATA to the folder with cifar10-jpeg and cifar10-resnets")
    return folder
