"""Stage 1: the teachers label a dataset, once.

plan minus manifest -> label_shards -> write_shard -> commit
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.common.device import Choice, Tuning
from softlabel.common.places import absolute_source, absolute_spec
from softlabel.dataset import Source
from softlabel.errors import MismatchError, UsageError
from softlabel.generation.deployment import Deployment
from softlabel.generation.growth import History, recorded_there
from softlabel.generation.job import Job, prepare
from softlabel.generation.labeller import BadImagePolicy
from softlabel.generation.preflight.check import Preflight
from softlabel.generation.preflight.check import preflight as try_out
from softlabel.generation.run import GenerateSummary, Label, label_missing
from softlabel.labels.combine import CombineRule
from softlabel.store.columns import EXTRA_NAME, Encoding
from softlabel.store.manifest import Format, ShardPlan
from softlabel.store.writer import Committer
from softlabel.views import view_policy


@check_arguments
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
    batch_size: int | Literal["auto"] = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    compile: bool = False,
    stack: Choice = "auto",
    members_in_turn: Choice = "auto",
    workers: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    ignore_labels: bool = False,
    on_bad_image: BadImagePolicy = "skip",
    encoding: Encoding | str = "float16",
    calibration: str | Path | None = None,
    grow: bool = False,
    views: int = 1,
    augment: str = "center",
    device: str = "auto",
    key_fn: Callable[[int], str | int] | None = None,
    deployment: Deployment | None = None,
    preflight: bool = True,
    progress: bool | None = None,
    begin: Callable[[Preflight | None], None] | None = None,
    options: Mapping[str, Any] | None = None,
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
        batch_size: samples a forward pass, always: the last batch is padded to it; ``auto`` finds the fastest. Where
            memory runs out it is halved.
        precision: of the forward pass; bf16 and fp16 use autocast.
        compile: let `torch.compile` have the teachers.
        stack: run members of one architecture as one stacked network; ``auto``: where a timed trial says so.
        members_in_turn: move members to the device one after the other; ``auto``: where they do not fit together.
        workers: processes that decode images; absent: none on a CPU, up to 8 beside a GPU.
        threads: that compute on a CPU; absent: as many as torch takes.
        seed: of the view policy, and of what a teacher's factory draws at random.
        ignore_labels: store no hard labels even if the data has them.
        on_bad_image: ``skip`` lists an image that cannot be decoded in the manifest, ``error`` stops at it.
        encoding: how logits are stored; a name for those without parameters, or an `Encoding`.
        calibration: file of `softlabel calibrate`; each teacher's logits are divided by its temperature in there first.
        grow: label the samples that a store of the smaller dataset lacks; its shards stay as they are.
        views: how many views of each sample are labelled; more than a store has adds those that it lacks.
        augment: what a view is, see `softlabel.views.parse_policy`: ``center`` (the image as it is), ``crop-flip``,
            ``inception``, ``trivial``, ``randaugment``, ``mixup``, ``cutmix``, several joined by ``+``, or a YAML file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        key_fn: index -> key, for a map-style dataset; the decimal index when absent.
        deployment: the Dask cluster whose workers label; absent: this process does.
        preflight: label two batches first, check that the disk has room, and warn of what looks wrong.
        progress: show a bar; absent: if standard error is a terminal.
        begin: called with what preflight found, once the store is open and something is left to do, before the first
            image is labelled.
        options: as JSON takes it: what the caller was given, kept in the manifest under `recorded.options`.

    Returns:
        Counts and times of this call.

    Raises:
        UsageError: a request that cannot be (SpecError, MismatchError: `out` holds another run's store).
        TeacherError: a member's output is not (B, C) finite numbers.
        DataError: a source that cannot be read, or a bad image if `on_bad_image` is ``error``.
        StoreError: the store cannot be written, or would not fit on its disk; what was committed stays and the same
            call resumes.
    """
    if deployment is not None:
        if not isinstance(data, str | Path):
            raise UsageError("data: on a cluster expected a SOURCE that every worker can open, found an object")
        data, teachers = absolute_source(str(data)), [absolute_spec(teacher) for teacher in teachers]
    job = prepare(
        data,
        history=History.of(out, grow=grow, views=views),
        views=view_policy(augment, count=views, seed=seed),
        teachers=teachers,
        combine=combine,
        weights=weights,
        temperature=temperature,
        format=format,
        shard_rows=shard_rows,
        batch_size=batch_size,
        precision=precision,
        tuning=Tuning(threads=threads, compile=compile, stack=stack, members_in_turn=members_in_turn),
        settled=recorded_there(out),
        workers=workers,
        seed=seed,
        ignore_labels=ignore_labels,
        on_bad_image=on_bad_image,
        encoding=encoding,
        calibration=calibration,
        device=device,
        key_fn=key_fn,
    )
    if options is not None:
        job.recorded["options"] = dict(options)
    with Committer.open(out, job.run, job.recorded, grow=bool(job.run.dataset.earlier)) as committer:
        if committer.manifest.recorded.get("derived") and committer.missing():
            raise MismatchError(
                f"{out}: was made from other stores, and teachers can add nothing to it: run the command that began it "
                "again if it is not finished, or label new samples into another folder and merge the two"
            )
        if job.labeller.head is not None:
            committer.add_extra(EXTRA_NAME, job.labeller.head.safetensors())
        label = None if deployment is None else _elsewhere(deployment, out, job, device)

        def ready(missing: Sequence[ShardPlan]) -> Preflight | None:
            found = try_out(job, out, missing, seed=seed) if preflight else None
            if begin is not None:
                begin(found)
            return found

        return label_missing(committer, out, job, progress=progress, begin=ready, label=label)


def _elsewhere(deployment: Deployment, out: str | Path, job: Job, device: str) -> Label:
    try:
        from softlabel.cluster import on_cluster
    except ImportError as error:
        raise UsageError(f"generation on a cluster needs Dask ({error}); pip install 'softlabel[dask]'") from None
    return on_cluster(deployment, out, job, device)
