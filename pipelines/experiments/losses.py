"""Which loss? Every `--loss` of `softlabel train` at its published numbers, from the same labels, in one pass a seed.

    python -m pipelines.experiments.losses --out losses
    python -m pipelines.experiments.losses --out losses --rows 6000 --epochs 6 --student zoo:cnn2 --lr 0.02

The second form took 5 minutes of one core; the first is estimated at 1.5 hours of two.

The published warm-up of the soft term of dkd is 20 of 240 epochs; in a shorter run its preset weight is never reached,
so that it is trained without warm-up too.
"""

from typing import get_args

from pipelines.experiments.common import Experiment, Row, find_resnet, make_parser, run_page
from softlabel.training.losses import LOSSES, LossName


def main() -> None:
    parser = make_parser(__doc__, rows=None, epochs=8)
    parser.add_argument("--teacher", default=find_resnet("resnet56-jpeg"), help="a SPEC with weights")
    parser.add_argument("--student", default="zoo:resnet8", help="a SPEC")
    parser.add_argument("--loss", nargs="+", choices=get_args(LossName), default=list(get_args(LossName)))
    options = parser.parse_args()

    with Experiment(options) as experiment:
        labels = experiment.label("teacher", [options.teacher])
        given = {"labels": labels, "student": options.student}
        losses = {loss: given | {"loss": loss} for loss in options.loss}
        if "dkd" in losses:
            losses["dkd, no warm-up"] = losses["dkd"] | {"soft_warmup": 0.0}
        passes: dict[int, dict[str, str | None]] = {}
        for seed in options.seeds:
            hard = experiment.train_one("hard", seed=seed, student=options.student)
            passes[seed] = {"hard labels": hard}
            if len(options.loss) > 1:
                passes[seed] |= experiment.train("presets", seed=seed, **given, loss=options.loss)
            else:
                passes[seed][options.loss[0]] = experiment.train_one("presets", seed=seed, **losses[options.loss[0]])
            if "dkd" in losses:
                name = "dkd, no warm-up"
                passes[seed][name] = experiment.train_one("dkd-no-warmup", seed=seed, **losses[name])
        rows = []
        for name in ("hard labels", *losses):
            notes = {"soft, hard": "0, 1", "T": "-"}
            if name in losses:
                preset = LOSSES[losses[name]["loss"]]
                at = preset.fixed or (preset.temperature or options.temperature,)
                notes = {
                    "soft, hard": f"{preset.soft_weight:g}, {preset.hard_weight:g}",
                    "T": " ".join(f"{one:g}" for one in at),
                }
            rows.append(Row(name=name, runs={seed: found[name] for seed, found in passes.items()}, notes=notes))
        experiment.finish(rows)


if __name__ == "__main__":
    run_page(main)
