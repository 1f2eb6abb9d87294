"""Stage 1: the teachers label a dataset, once.

plan minus manifest -> label_shard -> write_shard -> commit
"""

import contextlib
import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from softlabel.dataset import Source, open_source
from softlabel.device import decoders, resolve_device
from softlabel.engine import BadImagePolicy, LabelledShard, Labeller, label_shard
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.head import Head
from softlabel.history import History, check_same_data
from softlabel.intake import DecodedBatch
from softlabel.labels import CombineRule, normalized_weights
from softlabel.store.columns import EXTRA_NAME, Encoding
from softlabel.store.manifest import Combine, DatasetInfo, Format, Member, Run, ViewPolicy
from softlabel.store.writer import Committer, write_shard
from softlabel.teacher import Teacher, load_teacher

log = logging.getLogger("softlabel")

# One shard is written while the next is computed and a third waits: more would only hold memory.
WRITES_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What a call of `generate` did. Rows and images count this call's work, `total_rows` the finished store."""

    path: str
    total_rows: int
    total_bad: int
    shards_written: int
    images: int
    seconds: float
    teacher_accuracy: float | None

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def generate(
    data: "str | Path | Source | Dataset[Any]",
    *,
    teachers: Sequence[str],
    out: str | Path,
    combine: CombineRule = "logits",
    weights: Sequence[float] | None = None,
    temperature: float = 4.0,
    format: Format = "parquet",
    shard_rows: int = 16384,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    workers: int | None = None,
    seed: int = 0,
    ignore_labels: bool = False,
    on_bad_image: BadImagePolicy = "skip",
    encoding: Encoding | str = "float16",
    grow: bool = False,
    device: str = "auto",
    key_fn: Callable[[int], str] | None = None,
    progress: bool | None = None,
    begin: Callable[[], None] | None = None,
) -> GenerateSummary:
    """Run teachers over a dataset and store their combined soft labels; resumes what an earlier call left unfinished.

    Args:
        data: a SOURCE (see `open_source`), or a map-style dataset of (image, label) or images.
        teachers: one SPEC for each member of the ensemble, such as ``torchvision:resnet50@weights.pth``.
        out: folder of the store.
        combine: ``logits`` averages logits (re-tempers exactly), ``probs`` the softmax at `temperature`, ``keep``
            stores every member, to be mixed later.
        weights: one number a teacher, normalised to sum 1; equal when absent.
        temperature: logits are divided by it before they are stored.
        format: file format of the shards.
        shard_rows: samples a shard; what a kill can cost.
        batch_size: samples a forward pass; the last batch is padded to it.
        precision: of the forward pass; bf16 and fp16 use autocast.
        workers: processes that decode images; absent: none on a CPU, up to 8 beside a GPU.
        seed: of the view policy, and of what a teacher's factory draws at random.
        ignore_labels: store no hard labels even if the data has them.
        on_bad_image: ``skip`` lists an image that cannot be decoded in the manifest, ``error`` stops at it.
        encoding: how logits are stored; a name for those without parameters, or an `Encoding`.
        grow: label the samples that a store of the smaller dataset lacks; its shards stay as they are.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        key_fn: index -> key, for a map-style dataset; the decimal index when absent.
        progress: show a bar; absent: if standard error is a terminal.
        begin: called once the store is open and something is left to do, before the first image is labelled.

    Returns:
        Counts and times of this call.

    Raises:
        UsageError: a request that cannot be (SpecError, MismatchError: `out` holds another run's store).
        TeacherError: a member's output is not (B, C) finite numbers.
        DataError: a source that cannot be read, or a bad image if `on_bad_image` is ``error``.
        StoreError: the store cannot be written; what was committed stays and the same call resumes.
    """
    job = prepare(
        data,
        history=History.of(out, grow=grow),
        teachers=teachers,
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
        encoding=encoding,
        device=device,
        key_fn=key_fn,
    )
    with Committer.open(out, job.run, job.recorded, grow=grow) as committer:
        if committer.manifest.recorded.get("derived") and committer.missing():
            raise MismatchError(
                f"{out}: holds labels that were being made from another store, which teachers cannot finish; run the "
                "command that began it again, or choose another folder"
            )
        if job.labeller.head is not None:
            committer.add_extra(EXTRA_NAME, job.labeller.head.safetensors())
        return label_missing(committer, out, job, progress=progress, begin=begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Loaded and checked: what labels the shards of one run."""

    run: Run
    recorded: dict[str, Any]
    labeller: Labeller
    workers: int


def prepare(
    data: "str | Path | Source | Dataset[Any]",
    *,
    teachers: Sequence[str],
    combine: CombineRule,
    weights: Sequence[float] | None,
    temperature: float,
    format: Format,
    shard_rows: int,
    batch_size: int,
    precision: Literal["fp32", "bf16", "fp16"],
    workers: int | None,
    seed: int,
    ignore_labels: bool,
    on_bad_image: BadImagePolicy,
    encoding: Encoding | str,
    device: str,
    key_fn: Callable[[int], str] | None = None,
    history: History | None = None,
) -> Job:
    """Load data and teachers and check that they fit together; writes nothing. See `generate`."""
    if not teachers:
        raise UsageError("teachers: expected at least one SPEC, found none")
    for name, value in (("temperature", temperature), ("shard_rows", shard_rows), ("batch_size", batch_size)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{name}: expected a number above 0, found {value}")
    for name, given, allowed in (
        ("combine", combine, get_args(CombineRule)),
        ("format", format, get_args(Format)),
        ("on_bad_image", on_bad_image, get_args(BadImagePolicy)),
    ):
        if given not in allowed:
            raise UsageError(f"{name}: expected {' or '.join(allowed)}, found {given!r}")
    if workers is not None and workers < 0:
        raise UsageError(f"workers: expected at least 0, found {workers}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: expected at least 0, found {seed}")
    if combine == "keep" and weights is not None:
        raise UsageError("weights: with combine 'keep' nothing is mixed yet; give them when the members are mixed")
    source = open_source(data, key_fn=key_fn, ignore_labels=ignore_labels)
    if not len(source):
        raise DataError(f"{source.name}: holds no samples")
    source, earlier = history.arrange(source) if history is not None else (source, ())
    target = resolve_device(device)
    torch.manual_seed(seed)
    members = [load_teacher(spec, device=target, precision=precision) for spec in teachers]
    classes = {teacher.num_classes for teacher in members}
    if len(classes) > 1:
        listed = ", ".join(f"{teacher.spec.text} has {teacher.num_classes}" for teacher in members)
        raise MismatchError(f"teachers: expected one number of classes, found {listed}")
    run = Run(
        format=format,
        num_classes=members[0].num_classes,
        class_names=_class_names(source, members[0].num_classes),
        temperature=float(temperature),
        encoding=_encoding(encoding, members, temperature),
        combine=Combine(rule=combine, weights=normalized_weights(weights, len(members))),
        members=tuple(_member(teacher) for teacher in members),
        dataset=DatasetInfo(
            kind=source.kind,
            rows=len(source),
            fingerprint=source.fingerprint(),
            has_labels=source.has_labels,
            earlier=earlier,
        ),
        views=ViewPolicy(count=1, policy={"name": "center"}, seed=seed),
        shard_rows=shard_rows,
    )
    recorded = {
        "data": source.name,
        "teachers": [teacher.spec.text for teacher in members],
        "device": str(target),
        "batch_size": batch_size,
        "libraries": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    labeller = Labeller(source, members, run, batch_size=batch_size, on_bad_image=on_bad_image)
    return Job(run=run, recorded=recorded, labeller=labeller, workers=decoders(workers, target))


def label_missing(
    committer: Committer,
    out: str | Path,
    job: Job,
    *,
    progress: bool | None = None,
    begin: Callable[[], None] | None = None,
    complement: Callable[[LabelledShard], LabelledShard] | None = None,
) -> GenerateSummary:
    """Label and commit the shards that the store lacks, and declare it complete.

    begin: called before the first image is labelled. complement: what is added to a shard's rows before they are
    written.

    Raises:
        MismatchError: the data are not those that the store's shards were made from.
        DataError: no image could be labelled, in this call or before.
    """
    started = time.perf_counter()
    run, labeller = committer.run, job.labeller
    images = written = correct = labelled = 0
    missing = committer.missing()
    if committer.resumed:
        check_same_data(out, labeller.source)
    if begin is not None and missing:
        begin()
    good, first_bad = committer.manifest.totals.rows, ""
    rows = sum(plan.stop - plan.start for plan in missing)
    total = run.dataset.rows * run.views.count
    if missing and committer.resumed:
        log.info("%s: %d of %d shards are there", out, run.shard_count - len(missing), run.shard_count)
    batches = labeller.decoded(missing, job.workers)
    with _bar(total, total - rows, progress) as bar, _writer(committer, out) as write:
        for plan in missing:
            shard = label_shard(plan, labeller, _counted(batches, bar))
            write(shard if complement is None else complement(shard))
            images += len(shard.rows.keys) + len(shard.bad)
            good += len(shard.rows.keys)
            first_bad = first_bad or (f"; the first, {shard.bad[0].key!r}: {shard.bad[0].reason}" if shard.bad else "")
            correct, labelled = correct + shard.correct, labelled + shard.labelled
            written += 1
    if not good:
        raise DataError(f"{out}: no image could be labelled{first_bad}")
    totals = committer.finish().totals
    return GenerateSummary(
        path=str(out),
        total_rows=totals.rows,
        total_bad=totals.bad,
        shards_written=written,
        images=images,
        seconds=time.perf_counter() - started,
        teacher_accuracy=correct / labelled if labelled else None,
    )


def _encoding(encoding: Encoding | str, members: Sequence[Teacher], temperature: float) -> Encoding:
    """A full encoding from a name; ``head:float16`` and ``head:int8`` get their width from the teacher."""
    if isinstance(encoding, Encoding):
        if encoding.name == "topk" and temperature not in encoding.temperatures:
            raise UsageError(
                f"temperatures: expected the store's {temperature:g} among them, found {encoding.temperatures}"
            )
        return encoding
    name, _, hidden = encoding.partition(":")
    if name != "head":
        try:
            return Encoding(name=name)  # type: ignore[arg-type]
        except ValueError as error:
            raise UsageError(f"encoding: {error}") from None
    if len(members) > 1:
        raise UsageError(f"encoding head: stores the last layer of one teacher, found {len(members)} teachers")
    return Encoding(name="head", width=Head.of(members[0]).width, hidden=hidden or "float16")  # type: ignore[arg-type]


def _class_names(source: Source, num_classes: int) -> tuple[str, ...] | None:
    names = source.class_names
    if source.has_labels:
        highest = max(int(source.labels(start, start + 2**20).max()) for start in range(0, len(source), 2**20))
        if highest >= num_classes:
            raise MismatchError(
                f"classes: the teachers have {num_classes}, {source.name} has label {highest}; "
                "use teachers of these classes, or --ignore-labels to store the soft labels alone"
            )
    if names is None or len(names) == num_classes:
        return names
    if source.has_labels:
        raise MismatchError(
            f"classes: the teachers have {num_classes}, {source.name} has {len(names)}; "
            "use teachers of these classes, or --ignore-labels to store the soft labels alone"
        )
    return None


def _member(teacher: Teacher) -> Member:
    # Where its weights lie is not part of a store's identity: their hash is.
    spec = teacher.spec
    name = Path(spec.name).name if spec.kind == "run" else spec.name
    return Member(
        spec=dataclasses.replace(spec, name=name, checkpoint=None).text,
        sha256=teacher.sha256,
        preprocessing=teacher.preprocessing.to_dict(),
        precision=teacher.precision,
        num_classes=teacher.num_classes,
    )


@contextlib.contextmanager
def _writer(committer: Committer, out: str | Path) -> Iterator[Callable[[LabelledShard], None]]:
    """Write and commit in the background, few in flight; a failure is raised at the next call or at exit."""
    pending: list[Future[None]] = []

    def publish(shard: LabelledShard) -> None:
        record = write_shard(out, committer.run, shard.plan, shard.rows, shard.bad, fidelity=shard.fidelity)
        committer.commit(record)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="softlabel-writer") as pool:

        def write(shard: LabelledShard) -> None:
            while len(pending) >= WRITES_IN_FLIGHT or (pending and pending[0].done()):
                pending.pop(0).result()
            pending.append(pool.submit(publish, shard))

        yield write
        for future in pending:
            future.result()


def _counted(batches: Iterator[DecodedBatch], bar: "tqdm[Any]") -> Iterator[DecodedBatch]:
    for batch in batches:
        yield batch
        bar.update(len(batch.keys) + len(batch.bad))


def _bar(total: int, initial: int, progress: bool | None) -> "tqdm[Any]":
    return tqdm(
        total=total,
        initial=initial,
        unit="img",
        unit_scale=True,
        desc="labelling",
        disable=None if progress is None else not progress,
    )
