"""What is tuning worth? `softlabel tune` against the defaults, and against its cost with the teacher on line.

The search sees nine tenths of the training data and is judged on the last one; the best settings and the defaults of
`softlabel train`, also at the learning rate that was found, are then trained with every seed and measured on the test
set, once.

    python -m pipelines.experiments.tuning --out tuning
    python -m pipelines.experiments.tuning --out tuning --rows 5000 --epochs 9 --passes 2 --student zoo:cnn2

The second form took 2 minutes of one core; the first is estimated at half an hour of two.
"""

import time
from typing import get_args

from pipelines.experiments.common import Experiment, Row, find_resnet, make_parser, run_page
from softlabel.training.losses import LossName
from softlabel.training.tune import describe_settings, tune
from softlabel.training.tune_config import TuneConfig


def main() -> None:
    parser = make_parser(__doc__, rows=20_000, epochs=9)
    parser.add_argument("--teacher", default=find_resnet("resnet56-jpeg"), help="a SPEC with weights")
    parser.add_argument("--student", default="zoo:resnet8", help="a SPEC")
    parser.add_argument("--loss", nargs="+", choices=get_args(LossName), default=["kd", "standardized", "dist"])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--students", type=int, default=9, help="of each pass")
    options = parser.parse_args()

    with Experiment(options) as experiment:
        started = time.perf_counter()
        labels = experiment.label("teacher", [options.teacher])
        found = tune(
            TuneConfig(
                data=experiment.data,
                labels=labels,
                student=options.student,
                out=str(options.out / "search"),
                loss=options.loss,
                passes=options.passes,
                students=options.students,
            ),
            epochs=options.epochs,
            batch_size=options.batch_size,
            augment=options.augment,
            precision=options.precision,
            seed=options.seeds[0],
            progress=False,
        )
        print(f"searched in {time.perf_counter() - started:.0f} s\n{found.table()}\n{found.command}", flush=True)
        best = {name: value for name, value in found.best.settings.items() if value is not None}
        arms = {
            "defaults": {"loss": "kd"},
            "defaults, its learning rate": {"loss": "kd", "lr": best["lr"]},
            "found": best,
        }
        rows = []
        for name, settings in arms.items():
            runs = {
                seed: experiment.train_one(
                    name.replace(", ", "-").replace(" ", "-"),
                    seed=seed,
                    labels=labels,
                    student=options.student,
                    **settings,
                )
                for seed in options.seeds
            }
            shown = describe_settings(settings) if "lr" in settings else "as softlabel train has them"
            rows.append(Row(name=name, runs=runs, notes={"settings": shown}))
        epochs = sum(max(trial.scores, default=0) for trial in found.trials)
        print(
            f"the teacher ran over the data once; on line it would have run {options.passes * options.epochs} times "
            f"beside the students of a pass, and {epochs} times beside each student alone"
        )
        experiment.finish(rows, search={"students": len(found.trials), "epochs of all students": epochs})


if __name__ == "__main__":
    run_page(main)
