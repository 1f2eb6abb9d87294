"""Load and check everything that a run needs: data, members, and the identity of its store."""

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from softlabel.common.activation import Activation
from softlabel.common.device import decoders, resolve_device
from softlabel.common.spec import parse_spec
from softlabel.dataset import Source, detect_decoding, open_source, report_source, require_samples
from softlabel.errors import MismatchError, UsageError
from softlabel.generation.batch_size import find_batch_size
from softlabel.generation.config import GenerateConfig
from softlabel.generation.documents import (
    choose_shard_rows,
    describe_documents,
    has_language_models,
    read_documents,
    refuse_token_options,
)
from softlabel.generation.engine import connect_engines
from softlabel.generation.ensemble import Members, compile_members, find_stacks, load_members
from softlabel.generation.find_features import find_features
from softlabel.generation.growth import GROWN, History, new_runs
from softlabel.generation.input_reader import InputReader
from softlabel.generation.labeller import Labeller, Lane, describe_last_layer
from softlabel.generation.optimize import OPTIMIZED, Optimization, optimize_teachers
from softlabel.generation.token_lane import TokenLane
from softlabel.labels.calibration import read_calibration
from softlabel.labels.combine import normalized_weights
from softlabel.models import names_language_model
from softlabel.models.teacher import Teacher, load_teacher
from softlabel.store.encodings import Encoding, NoLabels, fitted
from softlabel.store.manifest import Combine, DatasetInfo, Member, Run
from softlabel.store.view_columns import ViewPolicy, check_pairs
from softlabel.views import Views, libraries

_TRIAL_BATCH = 256  # batch size of the stacking trial if the batch size is not known yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A loaded and checked run.

    Attributes:
        config: the configuration.
        run: the identity of the store.
        recorded: further content of its manifest.
        labeller: the teachers and their inputs.
        workers: decoding processes.
    """

    config: GenerateConfig
    run: Run
    recorded: dict[str, Any]
    labeller: Labeller
    workers: int


def load_job(
    data: "str | Path | Source | Dataset[Any]",
    teachers: Sequence[str],
    config: GenerateConfig,
    *,
    key_fn: Callable[[int], str | int] | None = None,
    history: History | None = None,
    recorded: Mapping[str, Any] | None = None,
    there: Run | None = None,
    trusted: DatasetInfo | None = None,
    first_member: int = 0,
) -> Job:
    """Load data and teachers and check that they fit together; writes nothing.

    Args:
        data: a SOURCE or a map-style dataset.
        teachers: SPECs.
        config: the configuration.
        key_fn: index -> key, for a map-style dataset.
        history: of a store that has grown or will grow.
        recorded: of an unfinished run, whose automatic choices are used again.
        there: of the store that is continued, whose choices of encoding and shards are used again.
        trusted: dataset whose keys and labels were checked before; they are not read again.
        first_member: number in the store of the first teacher, if others precede it.

    Raises:
        UsageError, DataError, TeacherError: as `softlabel.generate`.
    """
    if not teachers:
        raise UsageError("teachers: expected at least one SPEC, found none")
    recorded = recorded or {}
    source = _open_data(data, config, key_fn, look=trusted is None)
    # Documents have labels that their texts do not.
    of_documents = any(names_language_model(parse_spec(spec)) for spec in teachers)
    if trusted is None and not of_documents:
        report_source(source)
    views = _choose_views(source, config)
    source = detect_decoding(source, recorded)
    source, earlier = history.arrange(source, views) if history is not None else (source, ())
    device, tuning = resolve_device(config.device), config.tuning

    def load(where: torch.device) -> list[Teacher]:
        torch.manual_seed(config.seed)
        return [
            load_teacher(
                spec,
                device=where,
                precision=config.precision,
                num_classes=None if config.only is None else 0,
                kind=source.inputs.name,
                activation=config.activation,
                features=True,
            )
            for spec in teachers
        ]

    loaded, in_turn = load_members(load, device, tuning, len(teachers))
    documents = tokens = None
    if has_language_models(loaded):
        if in_turn:
            raise UsageError("teachers: language models do not run in turn; use a device with more memory, or fewer")
        documents, loaded = read_documents(source, loaded, config)
        source = documents
        if trusted is None and of_documents:
            report_source(source)
        tokens = describe_documents(documents, config)
    else:
        refuse_token_options(config)
    for teacher in loaded:
        if (takes := teacher.preprocessing.kind) != source.inputs.name:
            raise MismatchError(
                f"teacher {teacher.spec.text}: expected samples of kind {takes}, found {source.inputs.name} in "
                f"{source.name}; give a teacher for these"
            )
    classes = {teacher.num_classes for teacher in loaded}
    if len(classes) > 1:
        listed = ", ".join(f"{teacher.spec.text} has {teacher.num_classes}" for teacher in loaded)
        raise MismatchError(f"teachers: expected one number of classes, found {listed}")
    features = find_features(loaded, source, config)
    captured = None if features is None else f"--also {features.names[0]}"
    described = _make_members(loaded, config.calibration, config.activation)
    encoding = _fit_encoding(config, loaded, described[0].calibration, None if there is None else there.encoding)
    if views.directions:
        try:
            check_pairs(config.activation, config.combine, len(loaded), labels=encoding.labels)
        except ValueError as error:
            raise UsageError(f"augment: {error}") from None
    run = Run(
        format=config.format,
        num_classes=loaded[0].num_classes,
        class_names=_check_classes(source, loaded[0].num_classes, config.activation, look=trusted is None),
        activation=config.activation,
        temperature=float(config.temperature) if encoding.labels else 1.0,
        encoding=encoding,
        combine=Combine(rule=config.combine, weights=normalized_weights(config.weights, len(loaded))),
        members=described,
        dataset=DatasetInfo(
            kind=source.kind,
            rows=len(source),
            fingerprint=source.fingerprint() if trusted is None else trusted.fingerprint,
            has_labels=source.has_labels,
            earlier=earlier,
        ),
        input=source.inputs.name,
        views=views,
        shard_rows=config.shard_rows,
        tokens=tokens,
        features=features,
        compression=None if there is None or there.format != config.format else there.compression,
    )
    if encoding.from_hidden:
        captured = f"encoding {encoding.name}"
    if documents is not None:
        run = dataclasses.replace(run, shard_rows=choose_shard_rows(documents, config, run, there))
    connect_engines(loaded, run)
    if tuning.compile:
        compile_members(loaded, captured=captured)
    size = config.batch_size if isinstance(config.batch_size, int) else int(recorded.get("batch_size", 0))
    groups = find_stacks(
        loaded,
        tuning,
        batch_size=size or _TRIAL_BATCH,
        in_turn=in_turn,
        captured=None if features is None else captured,
        before=recorded.get("stacked"),
    )
    members = Members(loaded, groups=groups, in_turn=in_turn, device=device)
    reader = InputReader(source=source, transforms=members.transforms, views=Views.of(run))
    size = size or find_batch_size(members, reader, tuning)
    optimized: list[Optimization] = []
    if tuning.optimize != "none":
        loaded, optimized = optimize_teachers(
            members,
            reader,
            tuning,
            batch_size=size,
            samples=run.dataset.rows * views.count,
            captured=captured,
            before=recorded.get(OPTIMIZED),
        )
        members = Members(loaded, in_turn=in_turn, device=device)
    now = {
        "data": source.resolved_name or source.name,
        **({"decoding": source.decoding.to_dict()} if source.decoding.to_dict() else {}),
        "teachers": [teacher.spec.text for teacher in loaded],
        "device": str(device),
        "batch_size": size,
        "compile": tuning.compile,
        "stacked": [list(group) for group in groups],
        "libraries": {**libraries(), "numpy": np.__version__, "python": platform.python_version()},
    }
    if optimized and not recorded.get(OPTIMIZED):  # a store keeps its first choice, where it fails on a machine too
        now[OPTIMIZED] = [one.to_dict() for one in optimized]
    if earlier and (grown := _record_growths(source, run.dataset, recorded)):
        now[GROWN] = grown
    lane = Lane if documents is None else TokenLane
    labeller = Labeller(
        reader=reader,
        lane=lane.of(run, members, batch_size=size, first_member=first_member),
        on_bad_image=config.on_bad_image,
        tuning=tuning,
    )
    return Job(config=config, run=run, recorded=now, labeller=labeller, workers=decoders(config.workers, device))


def _choose_views(source: Source, config: GenerateConfig) -> ViewPolicy:
    """The view policy of a run.

    Raises:
        UsageError: it does not exist, or has steps that do not apply to the samples.
    """
    kind = source.inputs
    if config.views > 1 and kind.view_steps == frozenset():
        raise UsageError(
            f"views: {config.views} views are for images, found {kind.noun} in {source.name}; leave --views and "
            "--augment out"
        )
    views = config.view_policy
    steps = [str(step.get("op")) for step in views.policy.get("steps", [])]
    if odd := [step for step in steps if not kind.takes(step)]:
        if not kind.view_steps:
            raise UsageError(f"augment: {odd[0]!r} is for images, found {source.name}; leave --augment out")
        raise UsageError(
            f"augment: {odd[0]!r} is for 8-bit RGB images; the channels of {source.name} take "
            f"{' or '.join(sorted(kind.view_steps))}"
        )
    return views


def _open_data(
    data: "str | Path | Source | Dataset[Any]",
    config: GenerateConfig,
    key_fn: Callable[[int], str | int] | None,
    *,
    look: bool,
) -> Source:
    """Open the data; with `look`, read all keys."""
    source = open_source(data, key_fn=key_fn, ignore_labels=config.ignore_labels, check_keys=look)
    require_samples(source)
    return source


def _record_growths(source: Source, dataset: DatasetInfo, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the samples that each growth added, the recorded ones and the last; see `new_runs`."""
    found = dict(recorded.get(GROWN, {}))
    known = max((extent.rows for extent in dataset.earlier if extent.rows < dataset.rows), default=None)
    if known is not None and dataset.fingerprint not in found and (counts := new_runs(source, known)) is not None:
        found[dataset.fingerprint] = counts
    return found


def _fit_encoding(
    config: GenerateConfig, members: Sequence[Teacher], calibration: float, there: Encoding | None
) -> Encoding:
    """Complete the encoding's parameters; those of the last layer are the first teacher's."""
    if config.only is not None:
        return NoLabels()
    temperature = config.temperature
    try:
        found = fitted(
            config.encoding,
            temperature=temperature,
            layer=lambda: describe_last_layer(members[0], calibration),
            there=there,
        )
        found.check_activation(config.activation)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if found.from_hidden and len(members) > 1:
        raise UsageError(f"encoding {found.name}: stores the last layer of one teacher, found {len(members)} teachers")
    if not found.knows(temperature):
        raise UsageError(f"temperatures: expected the store's {temperature:g} among them, found {found.declared}")
    return found


def _check_classes(source: Source, num_classes: int, activation: Activation, *, look: bool) -> tuple[str, ...] | None:
    names = source.class_names
    if num_classes == 0:  # the teachers have none
        if source.label_width is not None:
            raise UsageError(
                f"labels: {source.name} has several classes at once, which only logits have; give --ignore-labels"
            )
        return None
    if num_classes == 1 and names is not None and len(names) == 2:
        names = names[1:]  # one output says whether it is the second of two classes
    if source.label_width is not None:
        _check_multi_hot(source.name, source.label_width, num_classes, activation)
    elif source.has_labels and look:
        highest = max(int(source.labels(start, start + 2**20).max()) for start in range(0, len(source), 2**20))
        if highest >= max(num_classes, 2):
            raise MismatchError(
                f"classes: the teachers have {num_classes}, {source.name} has label {highest}; "
                "use teachers of these classes, or --ignore-labels to store only soft labels"
            )
    if names is None or len(names) == num_classes:
        return names
    if source.has_labels:
        raise MismatchError(
            f"classes: the teachers have {num_classes}, {source.name} has {len(names)}; "
            "use teachers of these classes, or --ignore-labels to store only soft labels"
        )
    return None


def _check_multi_hot(name: str, width: int, num_classes: int, activation: Activation) -> None:
    if activation == "softmax":
        raise MismatchError(
            f"labels: {name} has several classes at once, the teachers' outputs are taken as one softmax; give "
            "--activation sigmoid for teachers of several labels, or --ignore-labels"
        )
    if width != num_classes:
        raise MismatchError(
            f"classes: the teachers have {num_classes}, the labels of {name} {width}; use teachers of these classes, "
            "or --ignore-labels to store the soft labels alone"
        )


def _make_members(
    teachers: Sequence[Teacher], calibration: "str | Path | Sequence[float] | None", activation: Activation
) -> tuple[Member, ...]:
    members = tuple(_make_member(teacher) for teacher in teachers)
    if calibration is None:
        return members
    if isinstance(calibration, str | Path):
        calibration = read_calibration(calibration).temperatures(members, calibration, activation)
    return tuple(dataclasses.replace(member, calibration=own) for member, own in zip(members, calibration, strict=True))


def _make_member(teacher: Teacher) -> Member:
    return Member(
        spec=teacher.spec.identity,
        sha256=teacher.sha256,
        preprocessing=teacher.preprocessing.to_dict(),
        precision=teacher.precision,
        num_classes=teacher.num_classes,
    )
