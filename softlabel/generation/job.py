"""What a run of the teachers needs, loaded and checked: data, members, and the identity of the store they fill."""

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from softlabel.common.device import Tuning, decoders, resolve_device
from softlabel.dataset import Source, open_source, report_source, require_samples, settle_decoding
from softlabel.errors import MismatchError, UsageError
from softlabel.generation.batch_size import find_batch_size
from softlabel.generation.ensemble import Members, compile_members, find_stacks, load_members
from softlabel.generation.growth import GROWN, History, new_runs
from softlabel.generation.labeller import BadImagePolicy, Labeller
from softlabel.labels.calibration import read_calibration
from softlabel.labels.combine import CombineRule, normalized_weights
from softlabel.models.head import Head
from softlabel.models.teacher import Teacher, load_teacher
from softlabel.store.columns import Encoding
from softlabel.store.manifest import Combine, DatasetInfo, Format, Member, Run, ViewPolicy
from softlabel.views import CENTER, libraries

_TRIAL_BATCH = 256  # where stacking is tried before the batch size is found


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
    batch_size: "int | Literal['auto']",
    precision: Literal["fp32", "bf16", "fp16"],
    workers: int | None,
    seed: int,
    ignore_labels: bool,
    on_bad_image: BadImagePolicy,
    encoding: Encoding | str,
    device: str,
    calibration: "str | Path | Sequence[float] | None" = None,
    key_fn: Callable[[int], str | int] | None = None,
    history: History | None = None,
    views: ViewPolicy | None = None,
    tuning: Tuning | None = None,
    settled: Mapping[str, Any] | None = None,
    believed: DatasetInfo | None = None,
) -> Job:
    """Load data and teachers and check that they fit together; writes nothing. See `generate`.

    calibration: the file of `softlabel calibrate`, or the temperatures themselves, one a teacher.
    views: absent: one, the image as it is.
    settled: what an unfinished run recorded, whose choices are kept where this one leaves them open.
    believed: what was found when all keys and labels of the data were read before, which is not done again.
    """
    if not teachers:
        raise UsageError("teachers: expected at least one SPEC, found none")
    for name, value in (
        ("temperature", temperature),
        ("shard_rows", shard_rows),
        ("batch_size", 1 if batch_size == "auto" else batch_size),
    ):
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
    source = open_source(data, key_fn=key_fn, ignore_labels=ignore_labels, check_keys=believed is None)
    require_samples(source)
    if believed is None:
        report_source(source)
    views = ViewPolicy(count=1, policy={"name": CENTER}, seed=seed) if views is None else views
    source = settle_decoding(source, settled)
    source, earlier = history.arrange(source, views) if history is not None else (source, ())
    target = resolve_device(device)
    tuning, settled = tuning or Tuning(), settled or {}

    def load(where: torch.device) -> list[Teacher]:
        torch.manual_seed(seed)
        return [load_teacher(spec, device=where, precision=precision) for spec in teachers]

    members, in_turn = load_members(load, target, tuning, len(teachers))
    classes = {teacher.num_classes for teacher in members}
    if len(classes) > 1:
        listed = ", ".join(f"{teacher.spec.text} has {teacher.num_classes}" for teacher in members)
        raise MismatchError(f"teachers: expected one number of classes, found {listed}")
    run = Run(
        format=format,
        num_classes=members[0].num_classes,
        class_names=_class_names(source, members[0].num_classes, look=believed is None),
        temperature=float(temperature),
        encoding=_encoding(encoding, members, temperature),
        combine=Combine(rule=combine, weights=normalized_weights(weights, len(members))),
        members=_members(members, calibration),
        dataset=DatasetInfo(
            kind=source.kind,
            rows=len(source),
            fingerprint=source.fingerprint() if believed is None else believed.fingerprint,
            has_labels=source.has_labels,
            earlier=earlier,
        ),
        views=views,
        shard_rows=shard_rows,
    )
    if tuning.compile:
        compile_members(members, head=run.encoding.name == "head")
    size = batch_size if isinstance(batch_size, int) else int(settled.get("batch_size", 0))
    groups = find_stacks(
        members, tuning, batch_size=size or _TRIAL_BATCH, in_turn=in_turn, before=settled.get("stacked")
    )
    together = Members(members, groups=groups, in_turn=in_turn, device=target)
    labeller = Labeller(
        source, together, run, batch_size=size or _TRIAL_BATCH, on_bad_image=on_bad_image, tuning=tuning
    )
    labeller.batch_size = size or find_batch_size(labeller)
    recorded = {
        "data": source.name,
        **({"decoding": source.decoding.to_dict()} if source.decoding.to_dict() else {}),
        "teachers": [teacher.spec.text for teacher in members],
        "device": str(target),
        "batch_size": labeller.batch_size,
        "compile": tuning.compile,
        "stacked": [list(group) for group in groups],
        "libraries": {**libraries(), "numpy": np.__version__, "python": platform.python_version()},
    }
    if earlier and (grown := _grown(source, run.dataset, settled)):
        recorded[GROWN] = grown
    return Job(run=run, recorded=recorded, labeller=labeller, workers=decoders(workers, target))


def _grown(source: Source, dataset: DatasetInfo, settled: Mapping[str, Any]) -> dict[str, Any]:
    """Which samples came with each growth, those of earlier ones as they were recorded; see `new_runs`."""
    found = dict(settled.get(GROWN, {}))
    known = max((extent.rows for extent in dataset.earlier if extent.rows < dataset.rows), default=None)
    if known is not None and dataset.fingerprint not in found and (counts := new_runs(source, known)) is not None:
        found[dataset.fingerprint] = counts
    return found


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


def _class_names(source: Source, num_classes: int, *, look: bool) -> tuple[str, ...] | None:
    names = source.class_names
    if source.has_labels and look:
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


def _members(teachers: Sequence[Teacher], calibration: "str | Path | Sequence[float] | None") -> tuple[Member, ...]:
    members = tuple(_member(teacher) for teacher in teachers)
    if calibration is None:
        return members
    if isinstance(calibration, str | Path):
        calibration = read_calibration(calibration).temperatures(members, calibration)
    return tuple(dataclasses.replace(member, calibration=own) for member, own in zip(members, calibration, strict=True))


def _member(teacher: Teacher) -> Member:
    return Member(
        spec=teacher.spec.identity,
        sha256=teacher.sha256,
        preprocessing=teacher.preprocessing.to_dict(),
        precision=teacher.precision,
        num_classes=teacher.num_classes,
    )
