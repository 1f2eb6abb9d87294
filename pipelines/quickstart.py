"""The whole way on scikit-learn's handwritten digits: two teachers, their soft labels, two students, one report.

Few digits have a label. The teachers learn from those; their ensemble then labels all digits, labelled or not; one
student learns from the few hard labels alone, the other from the soft labels of everything.

    python pipelines/quickstart.py --out demo
"""

import argparse
import io
import logging
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import softlabel
from softlabel.evaluation.plots import plot_runs

LABELLED, TEST = 150, 500  # of 1,797 digits; the rest is unlabelled
BATCH = 50
TEACHERS = {"resnet20": "zoo:resnet20?resize=16&crop=16", "resnet14": "zoo:resnet14?resize=16&crop=16"}
STUDENT = "zoo:resnet8?resize=16&crop=16"


def write_images(path: Path, images: np.ndarray, labels: list[int | None], start: int) -> str:
    """A Parquet file in the Hugging Face image layout: what the command line takes as --data."""
    rows = []
    for number, image in enumerate(images, start):
        png = io.BytesIO()
        Image.fromarray((image * 15.9375).astype(np.uint8)).save(png, "PNG")
        rows.append({"bytes": png.getvalue(), "path": f"digit-{number:04d}.png"})
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, image_type), "label": pa.array(labels, pa.int64())}), path)
    return str(path)


def prepare(folder: Path) -> dict[str, str]:
    """Three files: the labelled digits, the same with the unlabelled ones, and a test set that is not trained on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images, labels = digits.images[order], digits.target[order].tolist()
    folder.mkdir(parents=True, exist_ok=True)
    known, end = labels[:LABELLED], len(images) - TEST
    nothing: list[int | None] = [None] * (end - LABELLED)
    return {
        "labelled": write_images(folder / "labelled.parquet", images[:LABELLED], known, 0),
        "all": write_images(folder / "all.parquet", images[:end], [*known, *nothing], 0),
        "test": write_images(folder / "test.parquet", images[end:], labels[end:], end),
    }


def train(out: Path, student: str, data: str, test: str, **options: object) -> str:
    settings: dict[str, object] = {"batch_size": BATCH, "lr": 0.05, "crop_padding": 2, "augment": "crop", **options}
    config = softlabel.TrainConfig(data=data, student=student, out=str(out), eval_data=test, **settings)  # type: ignore[arg-type]
    softlabel.train(config)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that this writes")
    parser.add_argument("--epochs", type=int, default=60, help="epochs over the labelled digits")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.perf_counter()
    out: Path = options.out
    data = prepare(out / "data")
    print(f"1. {LABELLED} labelled digits, the rest unlabelled, {TEST} for the test: {out / 'data'}")

    teachers = []
    for name, spec in TEACHERS.items():
        run = train(out / "runs" / f"teacher-{name}", spec, data["labelled"], data["test"], epochs=options.epochs)
        teachers.append(f"run:{run}")
    print(f"2. trained the teachers {', '.join(TEACHERS)}: {out / 'runs'}")

    store = out / "labels"
    summary = softlabel.generate(data["all"], teachers=teachers, out=store, combine="probs", temperature=2.0)
    print(f"3. the ensemble labelled {summary.total_rows:,} digits, {LABELLED} of them with a hard label: {store}")

    # Both students take as many steps: the one with soft labels sees more digits in fewer epochs.
    fewer = max(1, round(options.epochs * (LABELLED // BATCH) / (summary.total_rows // BATCH)))
    students = {
        "hard labels alone": train(
            out / "runs" / "hard", STUDENT, data["labelled"], data["test"], epochs=options.epochs
        ),
        "soft labels": train(
            out / "runs" / "soft",
            STUDENT,
            data["all"],
            data["test"],
            epochs=fewer,
            labels=str(store),
            soft_weight=0.9,
            hard_weight=0.1,
        ),
    }
    print(f"4. trained the student twice: {out / 'runs'}")

    print(f"\n{'on the test digits':<26}{'accuracy':>10}{'cross-entropy':>16}{'calibration error':>20}")
    models = {
        **{f"teacher {t}": run.removeprefix("run:") for t, run in zip(TEACHERS, teachers, strict=True)},
        **students,
    }
    for name, run in models.items():
        label = name if name.startswith("teacher") else f"student, {name}"
        found = softlabel.evaluate(run, data["test"], progress=False)
        print(f"{label:<26}{found.accuracy:>10.4f}{found.cross_entropy:>16.4f}{found.calibration_error:>20.4f}")

    picture = plot_runs(students, out / "curves.png", title="The same student, with and without soft labels")
    # The teachers' labels of the test digits, so that the students are compared with them there too.
    checked = out / "test-labels"
    softlabel.generate(data["test"], teachers=teachers, out=checked, combine="probs", temperature=2.0)
    softlabel.write_report(
        store,
        data=data["all"],
        runs=list(students.values()),
        eval_data=data["test"],
        eval_labels=checked,
        out=out / "report.html",
        progress=False,
    )
    print(f"\nreport  {out / 'report.html'}      open it in a browser")
    print(f"store   {store}      look into it: softlabel inspect {store}")
    print(f"runs    {out / 'runs'}")
    print(f"curves  {picture}")
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
