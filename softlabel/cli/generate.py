"""Commands that run teachers over a dataset: generate, plan, calibrate."""

import shlex
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from softlabel.cli.config import read_options
from softlabel.cli.report import duration, print_preflight, print_summary, size

if TYPE_CHECKING:
    from softlabel.cli.encoding_options import EncodingOptions
    from softlabel.generation.config import GenerateConfig, LabelConfig
    from softlabel.generation.executor import Executor


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Options of a cluster that labels the shards.

    Attributes:
        scheduler: address of a running Dask scheduler, for example tcp://10.0.0.1:8786, whose workers label the shards.
        cluster: start a Dask cluster for this run: processes on this machine, SLURM, Kubernetes, or one per GPU.
        cluster_workers: number of workers to start; when absent, one for each core (local) or GPU (cuda) of this
            machine, or as in the options (kubernetes); required for slurm.
        cluster_options: YAML file with further arguments of the cluster's class (queue, memory, image, ...).
        shard_seconds: timeout of a shard on a cluster; when absent, from the durations of shards.
    """

    scheduler: str | None = None
    cluster: Literal["local", "slurm", "kubernetes", "cuda"] | None = None
    cluster_workers: int | None = None
    cluster_options: str | None = None
    shard_seconds: float | None = None

    def executor(self) -> "Executor":
        """Return the executor.

        Raises:
            UsageError: options do not fit together, or Dask is not installed.
        """
        from softlabel.errors import UsageError

        if self.scheduler is None and self.cluster is None:
            for name in ("cluster_workers", "cluster_options", "shard_seconds"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} belongs to --cluster or --scheduler, found neither")
            from softlabel.generation.executor import LocalExecutor

            return LocalExecutor()
        from softlabel.cluster.deployment import Deployment

        deployment = Deployment(
            scheduler=self.scheduler,
            cluster=self.cluster,
            cluster_workers=self.cluster_workers,
            cluster_options={} if self.cluster_options is None else read_options(self.cluster_options),
            shard_seconds=self.shard_seconds,
        )
        try:
            from softlabel.cluster.executor import DaskExecutor
        except ImportError as error:
            raise UsageError(f"generation on a cluster needs Dask ({error}); pip install 'softlabel[dask]'") from None
        return DaskExecutor(deployment)


def generate(
    *,
    data: str,
    teacher: list[str],
    out: str,
    config: "GenerateConfig",
    how: "EncodingOptions",
    where: ClusterOptions,
    no_preflight: bool = False,
) -> int:
    """Run one or several teachers over a dataset and store their soft labels.

    The same command resumes an interrupted one.

    Example:
        softlabel generate --data train.parquet --teacher torchvision:resnet50@resnet50.pth --out labels/resnet50

    Args:
        data: Parquet or tar files (one, a folder, data-{000..127}.tar, s3://...), a folder of images, arrays (.h5,
            .npy, .npz), a list of files (.txt, .csv), tables of numbers ('?inputs=COLUMN,COLUMN') or texts
            ('?text=COLUMN') in .parquet, .csv, .tsv or .jsonl, chats ('?messages=COLUMN') or token ids
            ('?tokens=COLUMN') in .parquet or .jsonl, torchvision:NAME?root=..., or digits; options behind '?', see the
            README.
        teacher: torchvision:NAME@CHECKPOINT, zoo:NAME@CHECKPOINT, timm:NAME@CHECKPOINT, hf:FOLDER, text:FOLDER,
            lm:FOLDER, lm:python:MODULE:FACTORY@CHECKPOINT, vllm:FOLDER, FILE.onnx, FILE.pt2,
            python:MODULE:FACTORY@CHECKPOINT or run:FOLDER; options after '?': mean, std, resize, crop, interpolation,
            squash, weights, pretrained, download, trust, tokenizer. Several make an ensemble.
        out: folder of the store.
        no_preflight: skip labelling two batches first, which shows the plan, checks the disk and warns about suspicious
            results.
    """
    from softlabel.generation.run import open_run

    encoding = how.encoding_at(config.temperature)
    assert encoding is not None, "the option has a default"
    options = {"data": data, "teacher": teacher, "out": out, **asdict(config), **asdict(how), **asdict(where)}
    executor = where.executor()
    with open_run(
        data,
        teachers=teacher,
        out=out,
        config=replace(config, encoding=encoding),
        executor=executor,
        options={**options, "no_preflight": no_preflight},
    ) as run:
        if not no_preflight and (found := run.preflight()) is not None:
            print_preflight(out, found, cluster=not executor.in_process)
        summary = run.label()
    print_summary(summary, data=data if config.only is None else None, encoding=encoding.name)
    return 0


def plan(
    *, data: str, teacher: list[str], config: "LabelConfig", encoding: list[str] | None = None, seconds: float = 5.0
) -> int:
    """Estimate the time of labelling, and the cost of every encoding in bytes and nats, from a short timed sample.

    Nothing is written.

    Example:
        softlabel plan --data train.parquet --teacher torchvision:resnet50@resnet50.pth

    Args:
        data: a SOURCE, see 'softlabel generate --help'.
        teacher: the SPECs, see 'softlabel generate --help'.
        encoding: show only these; all when absent.
        seconds: duration of the sample.
    """
    from softlabel.dataset.tokenize import TokenizedSource
    from softlabel.errors import UsageError
    from softlabel.generation.config import GenerateConfig
    from softlabel.generation.documents import count_positions
    from softlabel.generation.job import load_job
    from softlabel.generation.preflight.estimate import plan as run
    from softlabel.store.encodings import Encoding

    if encoding is not None and (
        odd := set(encoding) - set(known := [name for name, kind in Encoding.kinds.items() if kind.labels])
    ):
        raise UsageError(f"encoding: expected some of {', '.join(known)}, found {sorted(odd)[0]!r}")
    for name in encoding or ():
        try:
            Encoding.kinds[name].check_activation(config.activation)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds: expected above 0, found {seconds:g}")
    # An engine has to know what is kept before it is asked.
    kept = Encoding.kinds["topk"].from_options(temperature=config.temperature)
    chosen = {"encoding": kept} if encoding == ["topk"] else {}
    job = load_job(data, teacher, GenerateConfig.of(config, workers=0, **chosen))
    found = run(job, seconds=seconds)
    print(f"{data}: {found.rows:,} {found.noun}, {len(teacher)} teacher(s), {job.run.num_classes:,} classes")
    print(
        f"  {found.images_per_second:,.0f} {found.noun}/s on a sample of {found.sampled:,}: about "
        f"{duration(found.seconds)} for everything"
    )
    documents = source if isinstance(source := job.labeller.source, TokenizedSource) else None
    if found.accuracy is not None:
        what = "labels on the sample" if documents is None else f"next tokens at {found.labelled:,} sampled positions"
        print(f"  accuracy of the {what}: {found.accuracy:.4f}")
    if found.bad:
        print(f"  {found.bad} of the sampled {found.noun} cannot be decoded")
    nats, unit = "nats lost (mean / worst)", "bytes/row"
    if documents is not None:
        last = not job.labeller.teachers[0].is_engine
        unit, positions = "bytes/pos.", count_positions(documents, config.positions, last=last)
        tokens, measured = int(documents.lengths.sum()), found.offers[0].measured
        print(f"  {tokens:,} tokens, {positions:,} labelled positions, {measured:,} of them measured")
    print(f"\n{'encoding':<12}{unit:>10}{'whole store':>14}  {nats + ' at T = 1':<36}at T = {config.temperature:g}")
    for offer in found.offers:
        if encoding is None or offer.name.split()[0] in encoding:
            cost = offer.fidelity
            at_1 = at_t = "not known"
            if cost is not None:
                at_1, at_t = f"{cost.mean_t1:.1e} / {cost.worst_t1:.1e}", f"{cost.mean_t:.1e} / {cost.worst_t:.1e}"
            print(f"{offer.name:<12}{offer.row_bytes:>10,}{size(offer.total_bytes):>14}  {at_1:<20}{at_t}")
    for name in sorted(set(encoding or ()) - {offer.name.split()[0] for offer in found.offers}):
        print(f"{name:<12}{'-':>10}  does not fit these teachers and options")
    return 0


def calibrate(
    *,
    data: str,
    teacher: list[str],
    activation: Literal["softmax", "sigmoid"] = "softmax",
    out: str | None = None,
    samples: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    workers: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Fit a temperature to each teacher on labelled samples, and show its calibration before and after.

    Give the file to 'softlabel generate --calibration' to make members comparable before they are averaged.

    Example:
        softlabel calibrate --data val.parquet --teacher torchvision:resnet50@resnet50.pth --out calibration.json

    Args:
        data: a SOURCE with labels that the teachers were not trained on.
        teacher: the SPECs, see 'softlabel generate --help'.
        activation: what the teachers' outputs are logits of.
        out: JSON file for 'softlabel generate --calibration'; nothing is written when absent.
        samples: number of labelled samples to draw; all when absent.
        batch_size: samples per forward pass.
        precision: of the forward pass.
        workers: decoding processes; when absent, chosen for the machine.
        seed: of the draw, and of random factories of teachers.
        device: auto, cpu, cuda or cuda:N.
    """
    from softlabel.maintain.calibrate import calibrate as run

    found = run(
        data,
        teachers=teacher,
        activation=activation,
        out=out,
        samples=samples,
        batch_size=batch_size,
        precision=precision,
        workers=workers,
        seed=seed,
        device=device,
    )
    print(f"{data}: {found.samples:,} labelled samples")
    width = max(len(member.spec) for member in found.members)
    print(f"{'teacher':<{width}}  {'T':>7}  {'nll before':>10} {'after':>8}  {'ece before':>10} {'after':>8}")
    for member in found.members:
        print(
            f"{member.spec:<{width}}  {member.temperature:>7.4f}  {member.nll_before:>10.4f} {member.nll_after:>8.4f}"
            f"  {member.ece_before:>10.4f} {member.ece_after:>8.4f}"
        )
    if out is not None:
        print(f"wrote {out}; give it to 'softlabel generate --calibration {shlex.quote(out)}'")
    return 0
