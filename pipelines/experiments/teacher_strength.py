"""Can a teacher be too strong? Student accuracy against the size of the teacher (Cho and Hariharan 2019).

One pass for each teacher and seed trains all students from its labels, at fixed settings; the first row has hard labels
alone. The accuracy of each teacher on the test set stands beside that of its students.

    python -m pipelines.experiments.teacher_strength --out strength
    python -m pipelines.experiments.teacher_strength --out strength --rows 6000 --epochs 6 --lr 0.02 \\
        --student zoo:cnn2

The second form took 6 minutes of one core; the first is estimated at an hour of two.

The given ResNets of `*.th` were trained on the original pixels, those of `*-jpeg` on the JPEG images used here.
"""

from pipelines.experiments.common import Experiment, Row, find_resnet, make_parser, run_page

RESNETS = ("resnet20-12fca82f", "resnet32-d509ac18", "resnet44-014dd654", "resnet56-4bfd9763")
OF_JPEG = ("resnet20-jpeg", "resnet56-jpeg")


def main() -> None:
    parser = make_parser(__doc__, rows=None, epochs=8)
    parser.add_argument(
        "--teacher",
        nargs="+",
        default=[f"{name}={find_resnet(name)}" for name in (*RESNETS, *OF_JPEG)],
        metavar="NAME=SPEC",
        help="from small to large",
    )
    parser.add_argument("--student", nargs="+", default=["zoo:resnet8"], help="SPECs; trained in one pass")
    options = parser.parse_args()
    teachers = dict(one.split("=", 1) for one in options.teacher)

    with Experiment(options) as experiment:
        several = len(options.student) > 1
        passes = {
            "hard labels": {
                seed: experiment.train("hard", seed=seed, student=options.student) for seed in options.seeds
            }
        }
        for name, spec in teachers.items():
            labels = experiment.label(name, [spec])
            passes[name] = {
                seed: experiment.train(name, seed=seed, labels=labels, student=options.student)
                for seed in options.seeds
            }
        rows = []
        for student in next(iter(passes["hard labels"].values())):
            for name, found in passes.items():
                strength = f"{experiment.measure(teachers[name], options.test):.4f}" if name in teachers else ""
                named = f"{student} from {name}" if several else name
                runs = {seed: one[student] for seed, one in found.items()}
                rows.append(Row(name=named, runs=runs, notes={"teacher": strength}))
        experiment.finish(rows)


if __name__ == "__main__":
    run_page(main)
