"""Commands that run teachers over a dataset: generate, plan, calibrate."""

import shlex
from typing import TYPE_CHECKING, Literal

from softlabel.cli.config import read_options
from softlabel.cli.report import duration, size, tell, tell_preflight

if TYPE_CHECKING:
    from softlabel.generation.deployment import Deployment
    from softlabel.generation.preflight.check import Preflight
    from softlabel.store.columns import Encoding


def generate(
    *,
    data: str,
    teacher: list[str],
    out: str,
    combine: Literal["logits", "probs", "keep"] = "logits",
    weights: list[float] | None = None,
    temperature: float = 4.0,
    format: Literal["parquet", "hdf5"] = "parquet",
    shard_rows: int = 16384,
    batch_size: int | Literal["auto"] = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    compile: bool = False,
    stack: Literal["auto", "yes", "no"] = "auto",
    members_in_turn: Literal["auto", "yes", "no"] = "auto",
    workers: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    ignore_labels: bool = False,
    on_bad_image: Literal["skip", "error"] = "skip",
    encoding: Literal["float32", "float16", "int8", "topk", "sampled", "head"] = "float16",
    top_k: int | None = None,
    samples: int | None = None,
    temperatures: list[float] | None = None,
    hidden: Literal["float16", "int8"] | None = None,
    calibration: str | None = None,
    grow: bool = False,
    views: int = 1,
    augment: str = "center",
    no_preflight: bool = False,
    device: str = "auto",
    scheduler: str | None = None,
    cluster: Literal["local", "slurm", "kubernetes", "cuda"] | None = None,
    cluster_options: str | None = None,
    shard_seconds: float | None = None,
) -> int:
    """Run one or several teachers over a dataset and store their soft labels.

    The same command again resumes what was interrupted.

    Example:
        softlabel generate --data train.parquet --teacher torchvision:resnet50@resnet50.pth --out labels/resnet50

    Args:
        data: Parquet or tar files (one, a folder, data-{000..127}.tar, s3://...), a folder of images, arrays (.h5,
            .npy, .npz), a list of files (.txt, .csv), torchvision:NAME?root=..., or digits; options behind '?', see
            the README.
        teacher: torchvision:NAME@CHECKPOINT, zoo:NAME@CHECKPOINT, timm:NAME@CHECKPOINT, hf:FOLDER, FILE.onnx, FILE.pt2,
            python:MODULE:FACTORY@CHECKPOINT or run:FOLDER; options after '?': mean, std, resize, crop, interpolation,
            squash, weights, pretrained, download, trust. Several make an ensemble.
        out: folder of the store.
        combine: mean of the members' logits (re-tempers exactly), of their softmax at the temperature, or keep all.
        weights: one number a teacher, normalised to sum 1; equal when absent.
        temperature: logits are divided by it before they are stored.
        format: file format of the shards.
        shard_rows: samples a shard.
        batch_size: samples a forward pass; auto finds the fastest. Halved where memory runs out.
        precision: of the forward pass.
        compile: let torch.compile have the teachers.
        stack: run teachers of one architecture as one network; auto, where a timed trial says that this is faster.
        members_in_turn: move teachers to the device one after the other; auto, where they do not fit together.
        workers: processes that decode, or, with --cluster, workers of the cluster; absent, chosen from the machine
            (slurm wants a number).
        threads: that compute on a CPU, of each worker on a cluster; absent, as many as torch takes.
        seed: of the view policy, and of what a teacher's factory draws at random.
        ignore_labels: store no hard labels even if the data has them.
        on_bad_image: list an image that cannot be decoded and go on, or stop at it.
        encoding: how logits are stored; 'softlabel plan' shows what each costs in bytes and nats.
        top_k: classes that encoding topk keeps of a row; 50 when absent.
        samples: draws that encoding sampled keeps of a row; 50 when absent.
        temperatures: where the tail of encoding topk is known; the store's temperature when absent.
        hidden: type in which encoding head stores the teacher's last hidden layer; float16 when absent.
        calibration: file of 'softlabel calibrate': each teacher's logits are divided by its temperature first.
        grow: label the samples that a store of the smaller dataset lacks; its shards stay as they are.
        views: how many views of each sample; more than a store has adds those that it lacks.
        augment: what a view is: center (the image as it is), crop-flip, inception, trivial, randaugment, mixup or
            cutmix, with options as in inception?size=160, several joined by '+', or a YAML file with a list of these
            and of transforms in torchvision.transforms.v2.
        no_preflight: do not try two batches first, which shows the plan, checks the disk and warns of what looks wrong.
        device: auto, cpu, cuda or cuda:N.
        scheduler: address of a running Dask scheduler, such as tcp://10.0.0.1:8786, whose workers label the shards.
        cluster: start a Dask cluster for this run: processes on this machine, SLURM, Kubernetes, or one per GPU.
        cluster_options: YAML file with further arguments of the cluster's class (queue, memory, image, ...).
        shard_seconds: after which a shard on a cluster counts as hung; absent, from what shards take.
    """
    options = dict(locals())
    from softlabel.generation.generate import generate as run

    deployment = _deployment(scheduler, cluster, workers, cluster_options, shard_seconds)

    def begin(found: "Preflight | None") -> None:
        if found is not None:
            tell_preflight(out, found, cluster=deployment is not None)

    summary = run(
        data,
        teachers=teacher,
        out=out,
        combine=combine,
        weights=weights,
        temperature=temperature,
        format=format,
        shard_rows=shard_rows,
        batch_size=batch_size,
        precision=precision,
        compile=compile,
        stack=stack,
        members_in_turn=members_in_turn,
        threads=threads,
        workers=workers if deployment is None else 0,
        seed=seed,
        ignore_labels=ignore_labels,
        on_bad_image=on_bad_image,
        encoding=encoding_of(encoding, temperature, top_k, samples, temperatures, hidden),
        calibration=calibration,
        grow=grow,
        views=views,
        augment=augment,
        device=device,
        deployment=deployment,
        preflight=not no_preflight,
        begin=begin,
        options=options,
    )
    tell(summary, data)
    return 0


def _deployment(
    scheduler: str | None, cluster: str | None, workers: int | None, options_file: str | None, seconds: float | None
) -> "Deployment | None":
    """The cluster that the options name; None: this process labels."""
    from softlabel.errors import UsageError
    from softlabel.generation.deployment import Deployment

    if scheduler is None and cluster is None:
        for flag, value in (("--cluster-options", options_file), ("--shard-seconds", seconds)):
            if value is not None:
                raise UsageError(f"{flag} belongs to --cluster or --scheduler, found neither")
        return None
    options = {} if options_file is None else read_options(options_file)
    return Deployment(
        scheduler=scheduler,
        cluster=cluster,  # type: ignore[arg-type]
        workers=workers,
        options=options,
        shard_seconds=seconds,
    )


def encoding_of(
    name: str,
    temperature: float,
    top_k: int | None,
    samples: int | None,
    temperatures: list[float] | None,
    hidden: str | None,
) -> "Encoding | str":
    """The encoding that the options name; the width of `head` is the teacher's.

    Raises:
        UsageError: an option of another encoding, or a number that makes no sense.
    """
    from softlabel.errors import UsageError
    from softlabel.store.columns import Encoding

    owners = {"top_k": "topk", "temperatures": "topk", "samples": "sampled", "hidden": "head"}
    given = {"top_k": top_k, "temperatures": temperatures, "samples": samples, "hidden": hidden}
    for option, value in given.items():
        if value is not None and owners[option] != name:
            raise UsageError(f"--{option.replace('_', '-')} belongs to --encoding {owners[option]}, found {name!r}")
    try:
        if name == "topk":
            declared = tuple(sorted({float(temperature), *(temperatures or ())}))
            return Encoding(name="topk", k=50 if top_k is None else top_k, temperatures=declared)
        if name == "sampled":
            return Encoding(name="sampled", samples=50 if samples is None else samples)
    except ValueError as error:
        raise UsageError(f"encoding: {error}") from None
    hidden = hidden or "float16"
    return f"head:{hidden}" if name == "head" else name


def plan(
    *,
    data: str,
    teacher: list[str],
    combine: Literal["logits", "probs", "keep"] = "logits",
    weights: list[float] | None = None,
    temperature: float = 4.0,
    encoding: list[str] | None = None,
    calibration: str | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    seconds: float = 5.0,
    seed: int = 0,
    ignore_labels: bool = False,
    views: int = 1,
    augment: str = "center",
    device: str = "auto",
) -> int:
    """Show what labelling would take, and what every encoding costs in bytes and nats, from a short timed sample.

    Nothing is written.

    Example:
        softlabel plan --data train.parquet --teacher torchvision:resnet50@resnet50.pth

    Args:
        data: a SOURCE, see 'softlabel generate --help'.
        teacher: the SPECs, see 'softlabel generate --help'.
        combine: as for generate.
        weights: one number a teacher.
        temperature: at which the labels would be stored.
        encoding: show these alone (float32, float16, int8, topk, sampled, head); all when absent.
        calibration: as for generate.
        batch_size: samples a forward pass.
        precision: of the forward pass.
        seconds: how long the sample is labelled for.
        seed: of the sample.
        ignore_labels: do not look at hard labels.
        views: as for generate.
        augment: as for generate; the sample is of view 0.
        device: auto, cpu, cuda or cuda:N.
    """
    from softlabel.errors import UsageError
    from softlabel.generation.job import prepare
    from softlabel.generation.preflight.estimate import ENCODINGS
    from softlabel.generation.preflight.estimate import plan as run
    from softlabel.views import view_policy

    if encoding is not None and (odd := set(encoding) - set(ENCODINGS)):
        raise UsageError(f"encoding: expected some of {', '.join(ENCODINGS)}, found {sorted(odd)[0]!r}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds: expected above 0, found {seconds:g}")
    job = prepare(
        data,
        teachers=teacher,
        combine=combine,
        weights=weights,
        temperature=temperature,
        format="parquet",
        shard_rows=16384,
        batch_size=batch_size,
        precision=precision,
        workers=0,
        seed=seed,
        ignore_labels=ignore_labels,
        on_bad_image="skip",
        encoding="float16",
        calibration=calibration,
        device=device,
        views=view_policy(augment, count=views, seed=seed),
    )
    found = run(job, seconds=seconds, seed=seed)
    print(f"{data}: {found.rows:,} images, {len(teacher)} teacher(s), {job.run.num_classes:,} classes")
    print(
        f"  {found.images_per_second:,.0f} images/s on a sample of {found.sampled:,}: about "
        f"{duration(found.seconds)} for everything"
    )
    if found.accuracy is not None:
        print(f"  accuracy of the labels on the sample: {found.accuracy:.4f}")
    if found.bad:
        print(f"  {found.bad} images of the sample cannot be decoded")
    nats = "nats lost (mean / worst)"
    print(
        f"\n{'encoding':<12}{'bytes/row':>10}{'whole store':>14}  {nats + ' at T = 1':<36}{f'at T = {temperature:g}'}"
    )
    for offer in found.offers:
        if encoding is None or offer.name.split()[0] in encoding:
            cost = offer.fidelity
            at_1 = f"{cost.mean_t1:.1e} / {cost.worst_t1:.1e}"
            at_t = f"{cost.mean_t:.1e} / {cost.worst_t:.1e}"
            print(f"{offer.name:<12}{offer.row_bytes:>10,}{size(offer.total_bytes):>14}  {at_1:<20}{at_t}")
    return 0


def calibrate(
    *,
    data: str,
    teacher: list[str],
    out: str | None = None,
    samples: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    workers: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Fit a temperature to each teacher on labelled samples, and show its calibration before and after.

    The file makes members comparable before they are averaged: give it to 'softlabel generate --calibration'.

    Example:
        softlabel calibrate --data val.parquet --teacher torchvision:resnet50@resnet50.pth --out calibration.json

    Args:
        data: a SOURCE with labels, that the teachers were not trained on.
        teacher: the SPECs, see 'softlabel generate --help'.
        out: JSON file for 'softlabel generate --calibration'; nothing is written when absent.
        samples: how many labelled samples are drawn; all when absent.
        batch_size: samples a forward pass.
        precision: of the forward pass.
        workers: processes that decode; absent, chosen from the machine.
        seed: of the draw, and of what a teacher's factory draws at random.
        device: auto, cpu, cuda or cuda:N.
    """
    from softlabel.maintain.calibrate import calibrate as run

    found = run(
        data,
        teachers=teacher,
        out=out,
        samples=samples,
        batch_size=batch_size,
        precision=precision,
        workers=workers,
        seed=seed,
        device=device,
    )
    print(f"{data}: {found.samples:,} labelled images")
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
