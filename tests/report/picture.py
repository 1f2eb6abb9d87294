"""Make the picture of a report that the README shows: the first screen of real labels of CIFAR-10.

python -m tests.report.picture --out data/report.png
"""

import argparse
import os
import tempfile
from contextlib import chdir
from pathlib import Path

from PIL import Image

import softlabel
from tests.support.browser import CHROMIUM, NO_CHROMIUM, Browser
from tests.support.shared_data import require_shared_data

WIDTH, HEIGHT = 1200, 1010
COLOURS = 128  # of a palette, so that the file stays small
TEACHERS = ("resnet20", "resnet56")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/report.png"), help="the PNG to write")
    parser.add_argument("--rows", type=int, default=3000, help="images of the test split that are labelled")
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit(NO_CHROMIUM)
    out, shared = options.out.absolute(), require_shared_data()
    with tempfile.TemporaryDirectory() as name, chdir(name):
        # The page names the data as it was given: a short path, which is the same on every machine.
        os.symlink(shared / "cifar10-jpeg", "cifar10")
        teachers = [f"zoo:{one}@{shared / 'cifar10-resnets' / one}-jpeg.safetensors" for one in TEACHERS]
        data = f"cifar10/test.parquet?rows=0:{options.rows}"
        softlabel.generate(data, teachers=teachers, out="labels/cifar10", combine="keep", temperature=2.0)
        softlabel.write_report("labels/cifar10", data=data, out="report.html")
        with Browser(Path("profile").absolute()) as browser:
            browser.open(Path("report.html"), width=WIDTH, height=HEIGHT)
            browser.take_picture(Path("window.png"))
        with Image.open("window.png") as picture:
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
