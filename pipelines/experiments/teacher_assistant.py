"""Does a teacher assistant help? Mirzadeh et al. 2020, side by side with two answers to it.

A small student may learn less from a teacher that is far larger than from one a little larger than itself, so that an
assistant between them helps. Arms of the student: hard labels; KD from the large teacher; KD through the assistant; KD
from an early checkpoint of the large one (Cho and Hariharan 2019); KD from the mean of large one and assistant.

    python -m pipelines.experiments.teacher_assistant --out takd                       # cnn10 -> cnn4 -> cnn2
    python -m pipelines.experiments.teacher_assistant --out takd-resnet --chain resnet # resnet56 -> resnet20 -> resnet8
    python -m pipelines.experiments.teacher_assistant --out chain --large run:runs/big --assistant zoo:resnet20 \\
        --student zoo:resnet8 --data train.parquet --test test.parquet

With `--rows 10000 --epochs 5` the first took 8 minutes of one core; in full it is estimated at an hour of two.

Two weightings of the soft and the hard term: softlabel's defaults (0.9, 0.1, T = 4), and lambda / C and 1 - lambda of
the published code, which divides the soft term by the classes C; its lambda and T are chosen for each arm on the part
for choices, with the first seed. Published figures are the best epoch on the test set, maximised over trials, on the
original pixels: never to be subtracted from those here.
"""

import argparse
from dataclasses import dataclass, replace

import softlabel
from pipelines.experiments.common import Experiment, Row, find_resnet, make_parser, run_page
from softlabel.common.spec import parse_spec
from softlabel.models import network_of, read_run

CHAINS = {
    "cnn": ("zoo:cnn10", "zoo:cnn4", "zoo:cnn2"),
    "resnet": (find_resnet("resnet56-jpeg"), "zoo:resnet20", "zoo:resnet8"),
}
ARMS = ("large", "assistant", "early", "ensemble")
# Mirzadeh et al. 2020 for CIFAR-10; their large ResNet is resnet110.
PUBLISHED = {
    "cnn": {"hard": "0.7016", "large": "0.7257", "assistant": "0.7351"},
    "resnet": {"hard": "0.8852", "large": "0.8865", "assistant": "0.8898"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """Of the terms of the loss: name of the student's pass, and settings of `TrainConfig`."""

    name: str
    soft_weight: float
    hard_weight: float
    temperature: float


def read_options() -> argparse.Namespace:
    parser = make_parser(__doc__, rows=None, epochs=10, lr=0.02)
    parser.add_argument("--chain", choices=CHAINS, default="cnn", help="the networks (default: cnn)")
    parser.add_argument("--large", help="another SPEC; with weights it is not trained, but for its early checkpoint")
    parser.add_argument("--assistant", help="another SPEC")
    parser.add_argument("--student", help="another SPEC")
    parser.add_argument("--early", type=int, help="epochs of the early teacher (default: a third)")
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.5, 1.0], help="published weighting; 0: none")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[5.0, 10.0], help="published weighting")
    return parser.parse_args()


def strip_weights(spec: str) -> str:
    """Return the SPEC of the same network with new weights."""
    parsed = parse_spec(spec)
    if parsed.kind == "run":
        parsed = parse_spec(network_of(read_run(parsed.name)).student)
    return replace(parsed, checkpoint=None).text


def train_teachers(experiment: Experiment, large: str, assistant: str) -> dict[str, list[str]]:
    """Return the members of the teacher of every arm."""
    options = experiment.options
    early, seed = options.early or max(1, options.epochs // 3), options.seeds[0]
    if "@" in large or large.startswith("run:"):
        given = large
        early_one = experiment.train_one("early", seed=seed, student=strip_weights(large), epochs=early)
    else:
        trained = experiment.train_one("large", seed=seed, student=large, keep_epochs=[early])
        if trained is None:
            raise SystemExit("teacher_assistant: the large teacher's loss is not finite; lower --lr")
        given, early_one = trained, f"{trained}/epoch-{early}"
    helped = experiment.train_one("assistant", seed=seed, student=assistant, labels=experiment.label("large", [given]))
    if helped is None or early_one is None:
        raise SystemExit("teacher_assistant: a teacher's loss is not finite; lower --lr")
    return {"large": [given], "assistant": [helped], "early": [early_one], "ensemble": [given, helped]}


def train_arm(experiment: Experiment, arm: str, labels: str, student: str) -> list[Row]:
    """Return the rows of an arm, one for each weighting."""
    options, rows = experiment.options, []
    classes = softlabel.open_store(labels).run.num_classes
    default = Weighting(name="default", soft_weight=0.9, hard_weight=0.1, temperature=options.temperature)
    published = [
        Weighting(name=f"{share:g}-{T:g}", soft_weight=share / classes, hard_weight=1 - share, temperature=T)
        for share in options.lambdas
        if share
        for T in options.temperatures
    ]

    def train(weighting: Weighting, seed: int) -> str | None:
        return experiment.train_one(
            f"{arm}-{weighting.name}",
            seed=seed,
            student=student,
            labels=labels,
            temperature=weighting.temperature,
            soft_weight=weighting.soft_weight,
            hard_weight=weighting.hard_weight,
        )

    figures = PUBLISHED[options.chain] if options.student is None else {}
    for name, candidates in (("default", [default]), ("published", published)):
        if not candidates:
            continue
        first = {one.name: train(one, options.seeds[0]) for one in candidates}
        best = experiment.choose(first) if len(first) > 1 else candidates[0].name
        chosen = next(one for one in candidates if one.name == best)
        runs = {seed: train(chosen, seed) if seed != options.seeds[0] else first[best] for seed in options.seeds}
        weights = f"{chosen.soft_weight:g}, {chosen.hard_weight:g}, T {chosen.temperature:g}"
        notes = {"soft, hard": weights, "theirs": figures.get(arm, "") if name == "published" else ""}
        rows.append(Row(name=f"KD: {arm}, {name}", runs=runs, notes=notes))
    return rows


def main() -> None:
    options = read_options()
    networks = zip((options.large, options.assistant, options.student), CHAINS[options.chain], strict=True)
    large, assistant, student = (given or own for given, own in networks)
    with Experiment(options) as experiment:
        hard = {seed: experiment.train_one("hard", seed=seed, student=student) for seed in options.seeds}
        figure = PUBLISHED[options.chain]["hard"] if options.student is None else ""
        rows = [Row(name="hard labels", runs=hard, notes={"soft, hard": "0, 1", "theirs": figure})]
        teachers = train_teachers(experiment, large, assistant)
        for arm in ARMS:
            rows += train_arm(experiment, arm, experiment.label(arm, teachers[arm]), student)
        measured = {}
        for arm in ("large", "assistant", "early"):
            measured[arm] = experiment.measure(teachers[arm][0], options.test)
            print(f"accuracy of the {arm} teacher: {measured[arm]:.4f}")
        experiment.finish(rows, teachers=measured)


if __name__ == "__main__":
    run_page(main)
