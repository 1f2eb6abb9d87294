"""`train`: bring data, labels and students together, run or resume, and leave run folders that are SPECs."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from softlabel.common.device import decoders
from softlabel.dataset import Source, open_source, report_source, require_samples
from softlabel.errors import DataError, MismatchError, SpecError, TrainingError, UsageError
from softlabel.inputs.base import InputKind, InputTransform
from softlabel.labels.combine import Combination
from softlabel.loader import SoftLabelLoader
from softlabel.models import Program, build_model
from softlabel.models.teacher import student_preprocessing
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.training import run_folder
from softlabel.training.config import GRID, TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.epoch_loop import Pass, closing_loader
from softlabel.training.grid import StudentConfig, students_of
from softlabel.training.metrics import read_csv
from softlabel.training.student import Student
from softlabel.training.summary import StudentResult, TrainResult, announce, write_summary
from softlabel.views import CropFlip, Views

log = logging.getLogger("softlabel")

VIEWS = "views of the store"  # what a run's identity calls the number that it uses


def train(
    config: TrainConfig,
    *,
    data: "Source | Dataset[Any] | None" = None,
    eval_data: "Source | Dataset[Any] | None" = None,
    key_fn: Callable[[int], str | int] | None = None,
) -> TrainResult:
    """Train a student, or several in one pass, or go on with what is in `config.out` if it was interrupted.

    Ctrl-C and SIGTERM write a checkpoint after the step that is running, and raise KeyboardInterrupt. Processes that
    `torchrun` has started train together, and so do those of a process group that exists already.

    Args:
        config: see `TrainConfig`.
        data: used instead of opening `config.data`.
        eval_data: used instead of opening `config.eval_data`.
        key_fn: index -> key, for a map-style dataset given as `data`.

    Raises:
        UsageError: settings that make no sense (MismatchError: `out` holds another run; the student's classes are not
            the store's).
        MissingKeyError: samples without soft labels, see `config.missing`.
        DataError, StoreError: data or labels cannot be used.
        TrainingError: no student's loss is finite any more, the run folder cannot be written to, or another process of
            the run has ended.
    """
    started = time.perf_counter()
    with Ranks(config.device) as ranks:
        results = _train(config, ranks, data, eval_data, key_fn)
        # Nobody leaves before everything is written: the others read it.
        ranks.first(lambda: None)
    return TrainResult(out=config.out, students=tuple(results), seconds=time.perf_counter() - started)


def _train(
    config: TrainConfig,
    ranks: Ranks,
    data: "Source | Dataset[Any] | None",
    eval_data: "Source | Dataset[Any] | None",
    key_fn: Callable[[int], str | int] | None,
) -> list[StudentResult]:
    precision = _precision(config, ranks.device)
    source = open_source(config.data if data is None else data, key_fn=key_fn, ignore_labels=config.ignore_labels)
    require_samples(source)
    if ranks.is_first:
        report_source(source)
    store = open_store(config.labels) if config.labels is not None else None
    if store is not None and Views.mixes(store.run) and 0 in config.values("soft_weight"):
        raise UsageError(
            f"soft_weight: the views of {store.url} are mixed images, which have no hard label; expected above 0"
        )
    num_classes = _num_classes(source, store)
    configs = students_of(config)
    models = [_build(student, num_classes, source.inputs.name) for student in configs]
    _check_geometry(configs, [preprocessing for _, preprocessing in models])
    shared = _identity(config, source, store, precision, num_classes)
    views = ranks.first(lambda: _choose_views(config, configs, store))
    shared |= {} if views is None else {VIEWS: views}
    with contextlib.ExitStack() as held:
        standing = ranks.first(lambda: _hold(held, config, configs, shared))
        chosen = [number for number, found in enumerate(standing) if found is None]
        students: dict[int, Student] = {}
        before: dict[int, int] = {}
        if chosen:
            workers = decoders(config.workers, ranks.device)
            loader = SoftLabelLoader(
                source,
                store,
                batch_size=config.batch_size,
                seed=config.seed,
                tail="drop",
                augment=_augment(config, store, source.inputs),
                preprocessing=models[0][1],
                missing=config.missing,
                workers=workers,
                cache_mb=config.cache_mb,
                pin_memory=ranks.device.type == "cuda",
                combine=_combination(config, store),
                view_order=config.view_order,
                check_views=config.check_views,
                views=views,
                source_ratio=config.source_counts,
                streaming=config.streaming,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
            for number in chosen:
                model, preprocessing = models[number]
                temperature = configs[number].temperature
                student = students[number] = Student(
                    configs[number],
                    model,
                    preprocessing,
                    ranks=ranks,
                    precision=precision,
                    temperature=loader.temperature if temperature is None else temperature,
                    steps=len(loader),
                )
                student.resume()
                before[number] = student.epoch
            with (
                closing_loader(loader, ranks),
                _eval_loader(config, eval_data, models[0][1], ranks, workers) as eval_loader,
            ):
                going = Pass(config, ranks, loader, eval_loader, list(students.values()), num_classes)
                if ranks.is_first:
                    announce(config, ranks, loader, list(students.values()))
                going.run()
        results = []
        for number, (student_config, found) in enumerate(zip(configs, standing, strict=True)):
            results.append(found or _result(student_config, students[number], before[number]))
        if len(results) > 1 and ranks.is_first:
            write_summary(Path(config.out), results)
        if all(result.failure is not None for result in results):
            raise TrainingError(str(results[0].failure))
    return results


def _build(config: StudentConfig, num_classes: int, kind: str) -> tuple[nn.Module, InputTransform]:
    torch.manual_seed(config.shared.seed)  # each by itself: what a student starts from does not depend on the others
    model = build_model(config.student, num_classes=num_classes)
    if isinstance(model, Program):
        raise SpecError(f"student {config.student}: a file that is run as it is cannot be trained; name a network")
    return model, student_preprocessing(config.student, model, kind)


def _check_geometry(configs: list[StudentConfig], found: list[InputTransform]) -> None:
    """Students of one pass get the same pixels; how they are normalised is each student's own."""
    for config, preprocessing in zip(configs, found, strict=True):
        if preprocessing.shape != found[0].shape:
            raise UsageError(
                f"student {config.student}: takes {preprocessing.fit_in_words}, and {configs[0].student} "
                f"{found[0].fit_in_words}; students of one pass share their inputs: give them one size, or train them "
                "apart"
            )


def _hold(
    held: contextlib.ExitStack, config: TrainConfig, configs: list[StudentConfig], shared: Mapping[str, Any]
) -> list[StudentResult | None]:
    """Hold every student's folder for this run; the results of those that need no more training."""
    if len(configs) > 1:
        run_folder.hold_students(Path(config.out), {c.name: c.identity() for c in configs}, asdict(config))
    standing: list[StudentResult | None] = []
    for student in configs:
        folder = Path(student.out)
        # The file that makes this student by itself.
        one = asdict(config) | {"out": student.out}
        one |= {name: getattr(student, name) for name in GRID} if len(configs) > 1 else {}
        identity = {**student.identity(), **shared}
        if not config.overwrite and run_folder.is_finished(folder) and (before := run_folder.recorded_identity(folder)):
            identity |= {VIEWS: before[VIEWS]} if VIEWS in before else {}  # its epochs are over
        held.enter_context(run_folder.run_folder(folder, identity=identity, config=one, overwrite=config.overwrite))
        failure = run_folder.read_failure(folder)
        if run_folder.is_finished(folder):
            log.info("%s: finished already; --overwrite trains it again", folder)
            history = tuple(read_csv(folder / run_folder.METRICS))
            standing.append(StudentResult(name=student.name, out=student.out, history=history, already_done=True))
        elif failure is not None and len(configs) > 1:
            log.info("%s: given up before (%s); remove its %s to try again", folder, failure, run_folder.FAILED)
            history = tuple(read_csv(folder / run_folder.METRICS))
            standing.append(StudentResult(name=student.name, out=student.out, history=history, failure=failure))
        else:
            standing.append(None)
    return standing


def _result(config: StudentConfig, student: Student, before: int) -> StudentResult:
    return StudentResult(
        name=config.name,
        out=config.out,
        history=tuple(student.history),
        resumed_from=before,
        failure=student.failure,
    )


def _combination(config: TrainConfig, store: Store | None) -> Combination | None:
    asked = config.combine is not None or config.weights is not None
    if store is None or not store.run.kept:
        if asked:
            raise UsageError(
                "combine, weights: only the members of a store that keeps them apart can be combined; "
                "generate with --combine keep"
            )
        return None
    weights = None if config.weights is None else tuple(config.weights)
    rule, temperatures = config.combine or "probs", config.values("temperature")
    if len(temperatures) == 1:
        return Combination(rule=rule, weights=weights, temperature=temperatures[0])
    if rule == "probs":
        raise UsageError(
            "combine: probabilities are averaged at one temperature, and students of one pass share the average; use "
            f"--combine logits, or train the temperatures {temperatures} apart"
        )
    return Combination(rule=rule, weights=weights)  # the mean of logits re-tempers exactly


def _precision(config: TrainConfig, device: torch.device) -> str:
    if config.precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if config.precision == "fp16" and device.type != "cuda":
        raise UsageError("precision: fp16 trains on CUDA only; use bf16 or fp32 on the CPU")
    return config.precision


def _augment(config: TrainConfig, store: Store | None, kind: InputKind) -> CropFlip | None:
    chosen = config.augmentation(store, kind)
    return None if chosen == "none" else CropFlip(padding=config.crop_padding, flip=chosen == "crop-flip")


def _num_classes(source: Source, store: Store | None) -> int:
    """How many classes the student gets, checked against the labels that it will see."""
    labels_N = source.labels()
    highest = int(labels_N.max(initial=-1))
    if source.label_width is not None or (store is not None and store.run.activation == "sigmoid"):
        return _count_outputs(source, store, highest)
    if store is not None:
        classes, where = store.run.num_classes, f"the store {store.path} has"
    elif source.class_names is not None:
        classes, where = len(source.class_names), f"{source.name} names"
    elif highest >= 0:
        return source.highest_label() + 1
    else:
        raise DataError(f"{source.name}: no labels, hard or soft; give --labels STORE")
    if highest >= classes:
        key = source.keys(int(labels_N.argmax()), int(labels_N.argmax()) + 1)[0]
        raise MismatchError(
            f"{source.name}: sample {key!r} has label {highest}, {where} {classes} classes (0 to {classes - 1}); use "
            "the labels of this data, or --ignore-labels"
        )
    if store is None and highest < 0:
        raise DataError(f"{source.name}: no sample has a label; give soft labels with --labels STORE")
    return classes


def _count_outputs(source: Source, store: Store | None, highest: int) -> int:
    """The same of a student with independent outputs; the loader holds the labels against the store's classes."""
    if store is None:
        assert source.label_width is not None
        if highest < 0:
            raise DataError(f"{source.name}: no sample has a label; give soft labels with --labels STORE")
        return source.label_width
    classes = store.run.num_classes
    if source.label_width is None and highest >= max(classes, 2):
        raise MismatchError(
            f"{source.name}: has label {highest}, the store {store.path} has {classes} classes; use the labels of this "
            "data, or --ignore-labels"
        )
    return classes


def _identity(
    config: TrainConfig, source: Source, store: Store | None, precision: str, num_classes: int
) -> dict[str, Any]:
    """What decides what the weights become beside the settings: a run goes on only if all of it is the same."""
    hard_labels = hashlib.sha256(source.labels().astype("<i8").tobytes()).hexdigest()
    return {
        "augment": config.augmentation(store, source.inputs),
        "precision": precision,
        "classes": num_classes,
        run_folder.DATA_KEYS: source.fingerprint(),
        "samples of each source": [len(one) for one in getattr(source, "sources", [source])],
        "hard labels (fingerprint)": hard_labels,
        "store": None if store is None else store.manifest.store_id,
        # With samples that have no row, those that got one since would move all others.
        **({} if store is None or config.missing == "error" else {"samples of the store": store.run.dataset.rows}),
    }


def _choose_views(config: TrainConfig, configs: list[StudentConfig], store: Store | None) -> int | None:
    """How many views of the store this pass uses, None where its rows are no views: as many as its runs began with,
    though the store may have got more since, by which epoch e would be of another one."""
    if store is None or not store.run.view_columns:
        return None
    folders = [] if config.overwrite else [Path(student.out) for student in configs]
    begun = [run_folder.recorded_identity(folder) for folder in folders if not run_folder.is_finished(folder)]
    recorded = [found[VIEWS] for found in begun if isinstance(found.get(VIEWS), int)]
    return int(min([*recorded, store.run.views.count]))


@contextlib.contextmanager
def _eval_loader(
    config: TrainConfig,
    data: "Source | Dataset[Any] | None",
    preprocessing: InputTransform,
    ranks: Ranks,
    workers: int,
) -> Iterator[SoftLabelLoader | None]:
    chosen = config.eval_data if data is None else data
    if chosen is None:
        yield None
        return
    loader = SoftLabelLoader(
        chosen,
        batch_size=2 * config.batch_size,
        shuffle=False,
        # Filler makes the shares of processes equal, and is not counted.
        tail="pad" if ranks.several else "keep",
        preprocessing=preprocessing,
        workers=workers,
        cache_mb=config.cache_mb,
        pin_memory=ranks.device.type == "cuda",
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    with contextlib.closing(loader):
        yield loader
