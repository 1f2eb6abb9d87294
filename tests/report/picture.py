"""Make the picture of a report that the README shows: its first screen, and likely label errors of CIFAR-10.

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

WIDTH = 1200
TOP, GAP, BELOW = 624, 24, 346  # heights of the first screen, a gap, and the likely label errors
# Cards are laid out when they come into sight, which moves them.
SHOW = """
(async () => {
  for (let again = 0; again < 3; again++) {
    document.querySelector('#noise .cards').scrollIntoView();
    await new Promise((done) => setTimeout(done, 500));
  }
})()
"""
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
            browser.open(Path("report.html"), width=WIDTH, height=TOP)
            browser.take_picture(Path("top.png"))
            browser.open(Path("report.html"), width=WIDTH, height=BELOW)
            browser.run(SHOW)
            browser.take_picture(Path("below.png"))
        picture = Image.new("RGB", (WIDTH, TOP + GAP + BELOW), "white")
        for part, place in (("top.png", 0), ("below.png", TOP + GAP)):
            with Image.open(part) as window:
                picture.paste(window.convert("RGB"), (0, place))
        picture.save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
