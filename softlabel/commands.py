"""The commands of the command line: parameters are options, docstrings are help, they return the exit code.

Each imports what it needs when it runs, so that `softlabel --help` answers at once.
"""

from typing import Literal


def generate(
    *,
    data: str,
    teacher: list[str],
    out: str,
    combine: Literal["logits", "probs"] = "logits",
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
        combine: mean of the members' logits (re-tempers exactly) or of their softmax at the temperature.
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
        device: auto, cpu, cuda or cuda:N.
    """
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
        device=device,
    )
    if not summary.shards_written:
        print(f"{summary.path}: already complete, {summary.total_rows:,} rows; nothing to do")
        return 0
    print(f"{summary.path}: complete, {summary.total_rows:,} rows")
    print(
        f"  {summary.images:,} images labelled in {summary.seconds:.1f} s: {summary.images_per_second:,.0f} images/s, "
        f"{summary.shards_written} shards written"
    )
    if summary.teacher_accuracy is not None:
        print(f"  accuracy of these labels where a hard label exists: {summary.teacher_accuracy:.4f}")
    if summary.total_bad:
        print(f"  {summary.total_bad:,} bad images were skipped; 'softlabel inspect {summary.path}' lists them")
    return 0
