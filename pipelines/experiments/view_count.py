"""How many views are enough? Test accuracy against the number V of labelled views of each image, at equal steps.

A "consistent" teacher labels the very pixels that the student sees (Beyer et al. 2022). A store can hold V augmented
views of an image, which the student cycles through; with as many views as epochs, every one is fresh. The steps are as
many for every V; the images are few and the epochs many, which is where views count.

    python -m pipelines.experiments.view_count --out views
    python -m pipelines.experiments.view_count --out views --rows 2000 --epochs 36 --student zoo:cnn2

The second form took 8 minutes of one core, and 3 more for the labels; the first is estimated at 1.5 hours of two.

The store of each V is a copy of the one before, which grows: the teacher is run once for each view.
"""

import shutil
from pathlib import Path

from pipelines.experiments.common import Experiment, Row, find_resnet, make_parser, run_page


def copy_store(before: Path | None, store: Path) -> Path:
    """Begin a store as a copy of another one, and return its path; one that is there stays as it is."""
    if before is not None and not store.exists():
        unfinished = store.with_name(f"{store.name}.copy")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(before, unfinished)
        unfinished.rename(store)
    return store


def main() -> None:
    parser = make_parser(__doc__, rows=8_000, epochs=48, lr=0.02)
    parser.add_argument("--teacher", default=find_resnet("resnet56-jpeg"), help="a SPEC with weights")
    parser.add_argument("--student", default="zoo:cnn4", help="a SPEC")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="ascending")
    parser.add_argument("--policy", default="crop-flip", help="of the views, as for 'softlabel generate --augment'")
    options = parser.parse_args()
    counts = [views for views in options.views if views < options.epochs]
    if counts != sorted(set(counts)):
        parser.error(f"--views: expected ascending numbers, found {options.views}")

    with Experiment(options) as experiment:
        plain = experiment.label("plain", [options.teacher])
        rows = []
        passes = {
            seed: experiment.train("plain", seed=seed, labels=plain, student=options.student, soft_weight=[0.0, 0.9])
            for seed in options.seeds
        }
        for name, student in (
            ("hard labels, augmented", "soft0"),
            ("labels of the un-augmented image, augmented", "soft0.9"),
        ):
            rows.append(Row(name=name, runs={seed: runs[student] for seed, runs in passes.items()}))
        before: Path | None = None
        for views in [*counts, options.epochs]:
            name = f"views-{views}"
            before = copy_store(before, options.out / "labels" / name)
            labels = experiment.label(name, [options.teacher], views=views, augment=options.policy)
            runs = {
                seed: experiment.train_one(name, seed=seed, labels=labels, student=options.student, augment=None)
                for seed in options.seeds
            }
            named = f"V = {views}" + (", fresh every epoch" if views == options.epochs else "")
            rows.append(Row(name=named, runs=runs))
        experiment.finish(rows)


if __name__ == "__main__":
    run_page(main)
