"""Do derivatives of the teacher help a student of few images? At equal forward passes of the student.

Srinivas and Fleuret 2018 report gains of derivatives with few images of a class, and none with many. Three ways to
spend the same passes: views of crops; views of crops with noise; and views of crops beside each of which a step sees a
pair of noisy copies, for a term on half the difference of their logits (`noise-pair`), in three times fewer steps. Each
number of images has a table of its own, in its own folder.

    python -m pipelines.experiments.derivatives --out derivatives
    python -m pipelines.experiments.derivatives --out derivatives --images 100 500 --passes 20000

The noise of the views has the size of that of the pairs: `step` grey levels of 255.
"""

import argparse
import json
from pathlib import Path

from pipelines.experiments.common import Experiment, Row, find_resnet, make_parser, run_page


def compare(options: argparse.Namespace) -> None:
    """Train every arm on so many images (`options.rows`), and print their table."""
    crop, batch, step = options.policy, options.batch_size, options.step
    with Experiment(options) as experiment:
        noisy = options.out / "noise.yaml"  # JSON is YAML
        noisy.write_text(json.dumps([*_read_steps(crop), {"GaussianNoise": {"sigma": step / 255}}]))
        policies = {"crops": crop, "crops with noise": str(noisy), "pairs": f"{crop}+noise-pair?step={step}"}
        samples = max(1, options.rows * 9 // 10)
        rows = []
        for name, policy in policies.items():
            folder = name.replace(" ", "-")
            labels = experiment.label(folder, [options.teacher], views=options.views, augment=policy)
            each = 3 if name == "pairs" else 1  # passes of a sample
            epochs = max(1, round(options.passes / (samples * each)))
            weights = options.weight if name == "pairs" else [0.0]
            passes = {
                seed: experiment.train(
                    folder, seed=seed, labels=labels, student=options.student, epochs=epochs, augment=None,
                    difference_weight=weights, batch_size=min(batch, samples),
                )
                for seed in options.seeds
            }  # fmt: skip
            for number, weight in enumerate(weights):
                runs = {seed: list(found.values())[number] for seed, found in passes.items()}
                named = f"crops, pairs of noise, difference weight {weight:g}" if name == "pairs" else name
                rows.append(Row(name=named, runs=runs, notes={"epochs": str(epochs)}))
        experiment.finish(rows)


def _read_steps(policy: str) -> list[object]:
    from softlabel.views import parse_policy

    return [
        {step["op"]: {name: value for name, value in step.items() if name != "op"}}
        for step in parse_policy(policy)["steps"]
    ]


def main() -> None:
    parser = make_parser(__doc__, rows=None, epochs=1, lr=0.02)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 500, 5000], help="10, 50 and 500 of a class")
    parser.add_argument("--passes", type=int, default=120_000, help="forward passes of a student with a gradient")
    parser.add_argument("--teacher", default=find_resnet("resnet56-jpeg"), help="a SPEC with weights")
    parser.add_argument("--student", default="zoo:cnn4", help="a SPEC")
    parser.add_argument("--views", type=int, default=4, help="of each image, which the epochs go through")
    parser.add_argument("--policy", default="crop-flip", help="of the views, as for 'softlabel generate --augment'")
    parser.add_argument("--step", type=int, default=8, help="grey levels of the noise (default: 8)")
    parser.add_argument("--weight", type=float, nargs="+", default=[0.0, 0.3, 3.0], help="of the differences")
    options = parser.parse_args()
    for images in options.images:
        print(f"{images:,} images", flush=True)
        compare(argparse.Namespace(**{**vars(options), "rows": images, "out": Path(options.out) / str(images)}))


if __name__ == "__main__":
    run_page(main)
