"""Does a term on embeddings help beside soft labels? Every `--embedding-loss` at its published weight, in one pass.

All students have the soft labels of one teacher (kd); each but the first has one term more, on what the store has of
the teacher: its embeddings, which a store of encoding `head` holds beside its last layer, or for `at` its maps of
attention.

    python -m pipelines.experiments.embedding_losses --out embedding-losses
    python -m pipelines.experiments.embedding_losses --out embedding-losses --rows 4000 --epochs 4 --lr 0.05

The first form is estimated at 1.5 hours of two cores, the second at 5 minutes of one.
"""

from typing import get_args

from pipelines.experiments.common import Experiment, Row, find_resnet, make_parser, run_page
from softlabel.training.embedding_losses import EmbeddingLossName


def main() -> None:
    losses = [name for name in get_args(EmbeddingLossName) if name != "none"]
    parser = make_parser(__doc__, rows=None, epochs=8)
    parser.add_argument("--teacher", default=find_resnet("resnet56-jpeg"), help="a SPEC with weights")
    parser.add_argument("--student", default="zoo:resnet8", help="a SPEC")
    parser.add_argument("--embedding-loss", nargs="+", choices=losses, default=losses)
    options = parser.parse_args()

    with Experiment(options) as experiment:
        also = ["attention"] if "at" in options.embedding_loss else []
        labels = experiment.label("teacher", [options.teacher], encoding="head", also=also)
        names = ["none", *options.embedding_loss]
        runs: dict[str, dict[int, str | None]] = {name: {} for name in ["hard labels", *names]}
        for seed in options.seeds:
            runs["hard labels"][seed] = experiment.train_one("hard", seed=seed, student=options.student)
            found = experiment.train(
                "embeddings", seed=seed, student=options.student, labels=labels, embedding_loss=names
            )
            for name, spec in zip(names, found.values(), strict=True):
                runs[name][seed] = spec
        shown = {"none": "kd alone"} | {name: f"kd and {name}" for name in options.embedding_loss}
        experiment.finish([Row(name=shown.get(name, name), runs=one) for name, one in runs.items()])


if __name__ == "__main__":
    run_page(main)
