"""The commands of the command line: parameters are options, docstrings are help, they return the exit code.

Each imports what it needs when it runs, so that `softlabel --help` answers at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from softlabel.generate import GenerateSummary
    from softlabel.store.columns import Encoding
    from softlabel.train import TrainConfig

DAMAGED = 3  # exit code of `verify`
BAD_SHOWN = 10


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
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    workers: int | None = None,
    seed: int = 0,
    ignore_labels: bool = False,
    on_bad_image: Literal["skip", "error"] = "skip",
    encoding: Literal["float32", "float16", "int8", "topk", "sampled", "head"] = "float16",
    top_k: int = 50,
    samples: int = 50,
    temperatures: list[float] | None = None,
    hidden: Literal["float16", "int8"] = "float16",
    grow: bool = False,
    device: str = "auto",
) -> int:
    """Run one or several teachers over a dataset and store their soft labels.

    The same command again resumes what was interrupted.

    Example:
        softlabel generate --data train.parquet --teacher torchvision:resnet50@resnet50.pth --out labels/resnet50

    Args:
        data: Parquet file or folder of images, folder of images, torchvision:NAME?root=..., or digits.
        teacher: torchvision:NAME@CHECKPOINT, zoo:NAME@CHECKPOINT, python:MODULE:FACTORY@CHECKPOINT or run:FOLDER;
            options after '?': mean, std, resize, crop, interpolation, weights. Several make an ensemble.
        out: folder of the store.
        combine: mean of the members' logits (re-tempers exactly), of their softmax at the temperature, or keep all.
        weights: one number a teacher, normalised to sum 1; equal when absent.
        temperature: logits are divided by it before they are stored.
        format: file format of the shards.
        shard_rows: samples a shard.
        batch_size: samples a forward pass.
        precision: of the forward pass.
        workers: processes that decode; absent, chosen from the machine.
        seed: of the view policy, and of what a teacher's factory draws at random.
        ignore_labels: store no hard labels even if the data has them.
        on_bad_image: list an image that cannot be decoded and go on, or stop at it.
        encoding: how logits are stored; 'softlabel plan' shows what each costs in bytes and nats.
        top_k: classes that encoding topk keeps of a row.
        samples: draws that encoding sampled keeps of a row.
        temperatures: where the tail of encoding topk is known; the store's temperature when absent.
        hidden: type in which encoding head stores the teacher's last hidden layer.
        grow: label the samples that a store of the smaller dataset lacks; its shards stay as they are.
        device: auto, cpu, cuda or cuda:N.
    """
    options = dict(locals())
    from softlabel.generate import generate as run

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
        workers=workers,
        seed=seed,
        ignore_labels=ignore_labels,
        on_bad_image=on_bad_image,
        encoding=encoding_of(encoding, temperature, top_k, samples, temperatures, hidden),
        grow=grow,
        device=device,
    )
    tell(summary)
    if summary.shards_written:
        write_config(Path(out) / "config.yaml", options)
    return 0


def tell(summary: "GenerateSummary") -> None:
    """What a run of the teachers did."""
    if not summary.shards_written:
        print(f"{summary.path}: already complete, {summary.total_rows:,} rows; nothing to do")
        return
    print(f"{summary.path}: complete, {summary.total_rows:,} rows")
    print(
        f"  {summary.images:,} images labelled in {summary.seconds:.1f} s: {summary.images_per_second:,.0f} images/s, "
        f"{summary.shards_written} shards written"
    )
    if summary.teacher_accuracy is not None:
        print(f"  accuracy of these labels where a hard label exists: {summary.teacher_accuracy:.4f}")
    if summary.total_bad:
        print(f"  {summary.total_bad:,} bad images were skipped; 'softlabel inspect {summary.path}' lists them")


def encoding_of(
    name: str, temperature: float, top_k: int, samples: int, temperatures: list[float] | None, hidden: str
) -> "Encoding | str":
    """The encoding that the options name; the width of `head` is the teacher's."""
    from softlabel.store.columns import Encoding

    if name == "topk":
        return Encoding(name="topk", k=top_k, temperatures=tuple(sorted({temperature, *(temperatures or ())})))
    if name == "sampled":
        return Encoding(name="sampled", samples=samples)
    return f"head:{hidden}" if name == "head" else name


def inspect(store: str, /, *, json: bool = False) -> int:
    """Show what a store holds: its teachers, temperature, encoding and its cost, rows, bad images.

    Works on a store that is not finished, too.

    Example:
        softlabel inspect labels/resnet50

    Args:
        store: folder of the store.
        json: print the manifest as JSON.
    """
    import dataclasses
    from json import dumps

    from softlabel.commands_algebra import provenance
    from softlabel.store.reader import open_store

    opened = open_store(store, allow_incomplete=True)
    manifest = opened.manifest
    if json:
        print(dumps(dataclasses.asdict(manifest), indent=2))
        return 0
    run, totals = manifest.run, manifest.totals
    state = "complete" if manifest.complete else f"NOT COMPLETE, {totals.shards} of {run.shard_count} shards"
    per_row = sum(column.row_bytes for column in run.columns)
    lines = [
        ("store", f"{opened.path}  ({state})"),
        (
            "rows",
            f"{totals.rows:,} of {run.dataset.rows:,} samples x {run.views.count} view(s), {totals.shards} shards",
        ),
        ("size", f"{totals.bytes:,} bytes in {run.format} files"),
        ("data", f"{manifest.recorded.get('data', '?')}  ({run.dataset.kind}, fingerprint {run.dataset.fingerprint})"),
        ("labels", "hard labels stored" if run.dataset.has_labels else "no hard labels"),
        ("classes", _class_names(run.num_classes, run.class_names)),
        ("encoding", f"{run.encoding.name}, {per_row:,} bytes a row"),
        ("combine", f"{run.combine.rule} at temperature {run.temperature:g}"),
    ]
    if (cost := totals.fidelity) is not None:
        at = [(1.0, cost.mean_t1, cost.worst_t1), (run.temperature, cost.mean_t, cost.worst_t)]
        told = "; ".join(f"T = {t:g}: mean {mean:.1e}, worst {worst:.1e}" for t, mean, worst in dict.fromkeys(at))
        lines.append(("cost", f"KL(teacher || stored) in nats at {told}"))
    lines += provenance(manifest)
    weights = run.combine.weights or (1.0,) * len(run.members)
    for number, (member, weight) in enumerate(zip(run.members, weights, strict=True), 1):
        lines.append((f"teacher {number}", f"{member.spec}  weight {weight:.3g}, {member.precision}"))
        lines.append(("", f"weights sha256 {member.sha256}"))
        lines.append(("", ", ".join(f"{name} {value}" for name, value in member.preprocessing.items())))
    for key, reason in list(opened.bad.items())[:BAD_SHOWN]:
        lines.append(("bad image", f"{key}: {reason}"))
    if len(opened.bad) > BAD_SHOWN:
        lines.append(("", f"and {len(opened.bad) - BAD_SHOWN:,} more; --json lists every one"))
    print("\n".join(f"{name:<11}{text}" for name, text in lines))
    return 0


def verify(
    store: str,
    /,
    *,
    recompute: int = 0,
    data: str | None = None,
    teacher: list[str] | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Check every byte of a store: file hashes, rows, keys, ranges, finite values, manifest.

    Exit code 0 means whole, 3 damaged or not what --data shows.

    Example:
        softlabel verify labels/resnet50

    Args:
        store: folder of the store.
        recompute: run the teachers again on this many rows and report how far the stored labels are from theirs.
        data: check that the store covers this SOURCE, and the content hashes of its images.
        teacher: the SPECs for --recompute, where the weights are not at the recorded places any more.
        workers: threads; one a core when absent.
        device: auto, cpu, cuda or cuda:N.
    """
    import time

    from tqdm import tqdm

    from softlabel.store.verify import verify_store

    started = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, desc="verifying", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify_store(store, workers=workers, progress=progress)
    seconds = time.perf_counter() - started
    if not report.ok:
        for problem in report.problems:
            print(f"damaged: {problem}")
        print(f"{store}: DAMAGED, {len(report.problems)} problem(s) found")
        return DAMAGED
    print(f"{store}: whole. {report.rows:,} rows in {report.shards} shards, {report.bytes:,} bytes, {seconds:.1f} s")
    good = data is None or _tell_coverage(store, data)
    if recompute:
        _tell_recomputed(store, recompute, data, teacher, device)
    return 0 if good else DAMAGED


def _tell_coverage(store: str, data: str) -> bool:
    from softlabel.store.reader import open_store
    from softlabel.upkeep import coverage

    found = coverage(open_store(store), data)
    print(f"  {found.samples:,} samples in {data}, {found.compared:,} of them compared by content")
    for count, keys, what in (
        (found.missing_count, found.missing, "samples have no row"),
        (found.surplus_count, (), "rows are of samples that the data do not have"),
        (found.changed_count, found.changed, "images are not those that were labelled"),
    ):
        if count:
            print(f"  {count:,} {what}{': ' * bool(keys)}{', '.join(keys)}")
    return found.ok


def _tell_recomputed(store: str, rows: int, data: str | None, teachers: list[str] | None, device: str) -> None:
    from softlabel.store.reader import open_store
    from softlabel.upkeep import job_of, recompute

    opened = open_store(store)
    found = recompute(opened, job_of(opened.manifest, store, data=data, teachers=teachers, device=device), rows)
    print(
        f"  {found.rows:,} rows recomputed: scaled logits differ by {found.mean_difference:.1e} in the mean, "
        f"{found.worst_difference:.1e} at worst; top-1 differs in {found.top1_disagreement:.4%} of the rows"
    )


def repair(
    store: str,
    /,
    *,
    data: str | None = None,
    teacher: list[str] | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Relabel the shards of a store that are missing or damaged, and nothing else.

    Refused if teachers or data are not the same any more.

    Example:
        softlabel repair labels/resnet50

    Args:
        store: folder of the store.
        data: the SOURCE, where it is not at the recorded place any more.
        teacher: the SPECs, where the weights are not at the recorded places any more.
        workers: processes that decode; absent, chosen from the machine.
        device: auto, cpu, cuda or cuda:N.
    """
    from softlabel.upkeep import repair as run

    summary = run(store, data=data, teachers=teacher, workers=workers, device=device)
    if summary.shards_written:
        print(f"{store}: {summary.shards_written} shards relabelled, {summary.total_rows:,} rows, whole again")
    else:
        print(f"{store}: whole, {summary.total_rows:,} rows; nothing to repair")
    return 0


def extend(
    store: str,
    /,
    *,
    teacher: str,
    data: str | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Add a member to a store that keeps its members (--combine keep); the others are not run again.

    Example:
        softlabel extend labels/ensemble --teacher torchvision:resnet50@resnet50.pth

    Args:
        store: folder of the store.
        teacher: SPEC of the new member.
        data: the SOURCE, where it is not at the recorded place any more.
        workers: processes that decode; absent, chosen from the machine.
        device: auto, cpu, cuda or cuda:N.
    """
    from softlabel.extend import extend as run

    tell(run(store, teacher=teacher, data=data, workers=workers, device=device))
    return 0


def train(config: "TrainConfig") -> int:
    """Train a student from a store of soft labels, or on hard labels alone.

    The same command again resumes what was interrupted. Soft labels are joined to the images by key.

    Example:
        softlabel train --data train.parquet --labels labels/resnet50 --student zoo:resnet8 --epochs 10 --out runs/kd
    """
    from softlabel.train import train as run

    result = run(config)
    if result.already_done:
        print(f"{result.out}: already trained; --overwrite trains it anew")
        return 0
    last = result.history[-1]
    print(f"{result.out}: trained for {last.epoch} epochs, {last.step:,} steps, in {result.seconds:.1f} s")
    if last.eval_accuracy is not None:
        print(f"  accuracy on {config.eval_data}: {last.eval_accuracy:.4f}")
    print(f"  measure it with: softlabel evaluate --data SOURCE --model {result.out}")
    return 0


def evaluate(
    *,
    data: str,
    model: str,
    labels: str | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    missing: Literal["error", "skip", "hard-only"] = "error",
    workers: int = 0,
    device: str = "auto",
    out: str | None = None,
) -> int:
    """Measure a model: accuracy, cross-entropy, calibration error, agreement with the teacher of a store.

    Example:
        softlabel evaluate --data test.parquet --model runs/kd

    Args:
        data: a SOURCE with hard labels.
        model: the folder of a run, or a SPEC with a checkpoint.
        labels: a store of the same data, with which the model is compared too.
        batch_size: images a forward pass.
        precision: of the forward pass.
        missing: samples without a row in the store.
        workers: processes that decode.
        device: auto, cpu, cuda or cuda:N.
        out: JSON file for the figures; the settings go beside it.
    """
    options = dict(locals())
    from json import dumps

    from softlabel.evaluate import evaluate as run

    found = run(
        model,
        data,
        labels,
        batch_size=batch_size,
        precision=precision,
        missing=missing,
        workers=workers,
        device=device,
    )
    print(found)
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(found.to_dict(), indent=2) + "\n")
        write_config(path.with_suffix(".config.yaml"), options)
    return 0


def write_config(path: Path, options: Mapping[str, object]) -> None:
    """The resolved options as a file that ``--config`` takes."""
    import yaml

    path.write_text(yaml.safe_dump(dict(options), sort_keys=False))


def _class_names(count: int, names: tuple[str, ...] | None) -> str:
    if names is None:
        return f"{count:,}"
    shown = ", ".join(names[:10])
    return f"{count:,}: {shown}{', ...' if count > 10 else ''}"
