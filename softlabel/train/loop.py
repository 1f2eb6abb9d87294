"""`train`: bring data, labels and student together, run or resume, and leave a run folder that is a SPEC."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from softlabel.dataset import Source, open_source
from softlabel.device import decoders, resolve_device
from softlabel.errors import DataError, MismatchError, TrainingError, UsageError
from softlabel.labels import Mix
from softlabel.loader import SoftLabelLoader
from softlabel.models import RunModel, build_model, save_run
from softlabel.store.reader import Store, open_store
from softlabel.teacher import Preprocessing, student_preprocessing
from softlabel.train import files
from softlabel.train.config import TrainConfig
from softlabel.train.metrics import EpochMetrics, read_csv
from softlabel.train.run import Run
from softlabel.views import CropFlip

log = logging.getLogger("softlabel")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        out: the run folder; ``run:OUT`` is the student's SPEC.
        history: every epoch of the run, also those before it was resumed.
        seconds: wall time of this call.
        resumed_from: epochs that were done before this call.
        already_done: the folder held this very run, finished; nothing was done.
    """

    out: str
    history: tuple[EpochMetrics, ...]
    seconds: float
    resumed_from: int = 0
    already_done: bool = False


def train(
    config: TrainConfig,
    *,
    data: "Source | Dataset[Any] | None" = None,
    eval_data: "Source | Dataset[Any] | None" = None,
    key_fn: Callable[[int], str] | None = None,
) -> TrainResult:
    """Train a student, or go on with the run in `config.out` if it was interrupted.

    Ctrl-C and SIGTERM write a checkpoint after the step that is running, and raise KeyboardInterrupt.

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
        TrainingError: the loss is not finite any more, or the run folder cannot be written to.
    """
    started = time.perf_counter()
    device = resolve_device(config.device)
    precision = _precision(config, device)
    source = open_source(config.data if data is None else data, key_fn=key_fn, ignore_labels=config.ignore_labels)
    store = open_store(config.labels, verify="full") if config.labels is not None else None
    num_classes = _num_classes(source, store)
    torch.manual_seed(config.seed)
    model = build_model(config.student, num_classes=num_classes)
    preprocessing = student_preprocessing(config.student, model)
    identity = _identity(config, source, store, precision, num_classes)
    folder = Path(config.out)
    with files.run_folder(folder, identity=identity, config=asdict(config), overwrite=config.overwrite):
        if files.is_finished(folder):
            log.info("%s: finished already; --overwrite trains it anew", folder)
            history = tuple(read_csv(folder / files.METRICS))
            return TrainResult(out=str(folder), history=history, seconds=0.0, already_done=True)
        workers = decoders(config.workers, device)
        loader = SoftLabelLoader(
            source,
            store,
            batch_size=config.batch_size,
            seed=config.seed,
            tail="drop",
            augment=_augment(config),
            preprocessing=preprocessing,
            missing=config.missing,
            workers=workers,
            cache_mb=config.cache_mb,
            pin_memory=device.type == "cuda",
            mix=_mix(config, store),
        )
        with contextlib.closing(loader), _eval_loader(config, eval_data, preprocessing, device, workers) as eval_loader:
            run = Run(config, loader, eval_loader, model, preprocessing, device, precision)
            resumed_from = run.resume(folder)
            run.announce()
            try:
                run.train(folder)
            except (RuntimeError, OSError, EOFError) as error:
                loader.raise_if_worker_died(error)
                raise
        described = RunModel(student=config.student, num_classes=num_classes, preprocessing=preprocessing.to_dict())
        try:
            save_run(folder, model, described)
        except OSError as error:
            raise TrainingError(
                f"{folder}: the student cannot be written: {error}; the same command resumes"
            ) from error
    seconds = time.perf_counter() - started
    return TrainResult(out=str(folder), history=tuple(run.history), seconds=seconds, resumed_from=resumed_from)


def _mix(config: TrainConfig, store: Store | None) -> Mix | None:
    asked = config.mix_rule is not None or config.mix_weights is not None
    if store is None or not store.run.kept:
        if asked:
            raise UsageError(
                "mix_rule, mix_weights: only the members of a store that keeps them apart can be mixed; "
                "generate with --combine keep"
            )
        return None
    weights = None if config.mix_weights is None else tuple(config.mix_weights)
    return Mix(rule=config.mix_rule or "probs", weights=weights, temperature=config.temperature)


def _precision(config: TrainConfig, device: torch.device) -> str:
    if config.precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if config.precision == "fp16" and device.type != "cuda":
        raise UsageError("precision: fp16 trains on CUDA only; use bf16 or fp32 on the CPU")
    return config.precision


def _augment(config: TrainConfig) -> CropFlip | None:
    return (
        None if config.augment == "none" else CropFlip(padding=config.crop_padding, flip=config.augment == "crop-flip")
    )


def _num_classes(source: Source, store: Store | None) -> int:
    """How many classes the student gets, checked against the labels that it will see."""
    labels_N = source.labels()
    highest = int(labels_N.max(initial=-1))
    if store is not None:
        classes, where = store.run.num_classes, f"the store {store.path} has"
    elif source.class_names is not None:
        classes, where = len(source.class_names), f"{source.name} names"
    elif highest >= 0:
        return highest + 1
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


def _identity(
    config: TrainConfig, source: Source, store: Store | None, precision: str, num_classes: int
) -> dict[str, Any]:
    """What decides what the weights become: a run goes on only if all of it is the same."""
    hard_labels = hashlib.sha256(source.labels().astype("<i8").tobytes()).hexdigest()
    return config.identity() | {
        "precision": precision,
        "classes": num_classes,
        "data (fingerprint of the keys)": source.fingerprint(),
        "hard labels (fingerprint)": hard_labels,
        "store": None if store is None else store.manifest.store_id,
    }


@contextlib.contextmanager
def _eval_loader(
    config: TrainConfig,
    data: "Source | Dataset[Any] | None",
    preprocessing: Preprocessing,
    device: torch.device,
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
        preprocessing=preprocessing,
        workers=workers,
        cache_mb=config.cache_mb,
        pin_memory=device.type == "cuda",
    )
    with contextlib.closing(loader):
        yield loader
