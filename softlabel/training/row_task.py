"""Samples that have one label each (images, texts, arrays of numbers) as what students learn from."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from softlabel.common.activation import Activation
from softlabel.common.multi_hot import is_labelled
from softlabel.dataset import Source, report_source
from softlabel.errors import DataError, MismatchError, SpecError, UsageError
from softlabel.evaluation.evaluate import Measurement
from softlabel.inputs.base import InputKind, Inputs, InputTransform
from softlabel.loader import Batch, SoftLabelLoader
from softlabel.loader.features import BatchFeature
from softlabel.models import Program, build_model
from softlabel.models.teacher import student_preprocessing
from softlabel.store.reader import Store
from softlabel.store.view_columns import DIFFERENCE
from softlabel.training.config import TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.embedding_setup import (
    NegativeDraws,
    check_embeddings,
    embedding_width,
    list_features,
    make_parts,
    needs_negatives,
)
from softlabel.training.embedding_student import EmbeddingStudent
from softlabel.training.grid import StudentConfig
from softlabel.training.loss_check import check_losses
from softlabel.training.row_student import RowStudent
from softlabel.training.step import Counts, RowStep, cut, prepare, without_filler
from softlabel.training.student import Student
from softlabel.training.task import Loader, Task
from softlabel.views import CropFlip, Views


class RowTask(Task):
    """See `Task`."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        config, source, store = self.config, self.source, self.store
        if self.report:
            report_source(source)
        if store is not None and store.run.tokens is not None:
            raise MismatchError(
                f"{store.path}: has a label for each token, which language models learn from; give --student lm:FOLDER"
            )
        for name in ("pack", "pad", "batch_tokens"):
            if (value := getattr(config, name)) is not None:
                raise UsageError(
                    f"{name}: {value} is for language models, found student {self.configs[0].student}; leave "
                    f"--{name.replace('_', '-')} out, or give --student lm:FOLDER"
                )
        if store is not None and Views.mixes(store.run) and 0 in config.values("soft_weight"):
            raise UsageError(
                f"soft_weight: the views of {store.url} are mixed images, which have no hard label; expected above 0"
            )
        check_embeddings(config, self.configs, store)
        self.unit = source.inputs.unit
        # Of embeddings alone a store has no classes: they are those of the data, if there are any.
        of_labels = store if store is None or store.run.encoding.labels else None
        self._has_classes = of_labels is not None or bool(is_labelled(source.labels()).any())
        if self._has_classes or store is None or store.run.embedding is None:
            self.num_classes = _num_classes(source, of_labels)
        else:
            self.num_classes = embedding_width(store)
        self._models = [_build(student, self.num_classes, source.inputs.name) for student in self.configs]
        _check_geometry(self.configs, [preprocessing for _, preprocessing in self._models])
        self._loader: SoftLabelLoader | None = None
        self._draws: NegativeDraws | None = None
        assert config.batch_size is not None
        self._batch_size = config.batch_size
        self._filter = config.label_filter
        for one in self.configs:
            if one.optimizer == "dot":
                _check_dot(one, self.precision)
        if store is not None:  # before run folders are made, which would keep a corrected command from this --out
            has_labels = bool(is_labelled(self.source.labels()).any()) and not Views.mixes(store.run)
            check_losses(self.configs, store, self.combination, self._filter, has_labels=has_labels)

    @property
    def activation(self) -> Activation:
        return self._activation

    def identity(self) -> dict[str, Any]:
        return {"augment": self.config.augmentation(self.store, self.source.inputs), **super().identity()}

    def _identify_samples(self) -> dict[str, Any]:
        source = self.source
        return {
            "samples of each source": [len(one) for one in getattr(source, "sources", [source])],
            "hard labels (fingerprint)": hashlib.sha256(source.labels().astype("<i8").tobytes()).hexdigest(),
        }

    def count_views(self) -> int | None:
        store = self.store
        return store.run.views.count if store is not None and store.run.view_columns else None

    def open_loader(self, ranks: Ranks, workers: int, views: int | None) -> SoftLabelLoader:
        config = self.config
        loader = SoftLabelLoader(
            self.source,
            self.store,
            batch_size=self._batch_size,
            seed=config.seed,
            tail="drop",
            augment=_augment(config, self.store, self.source.inputs),
            preprocessing=self._models[0][1],
            missing=config.missing,
            workers=workers,
            cache_mb=config.cache_mb,
            cache_device=ranks.device if config.cache == "device" else None,
            pin_memory=ranks.device.type == "cuda",
            combine=self.combination,
            also=_list_features(self.configs),
            view_order=config.view_order,
            check_views=config.check_views,
            views=views,
            source_ratio=config.source_counts,
            streaming=config.streaming,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self._activation: Activation = loader.dataset.activation
        self._loader = loader
        if self.store is not None and any(needs_negatives(one.embedding_loss) for one in self.configs):
            self._draws = NegativeDraws(loader.dataset, self.store, seed=config.seed, device=ranks.device)
        return loader

    @contextlib.contextmanager
    def open_eval_loader(self, data: Any, ranks: Ranks, workers: int) -> Iterator[SoftLabelLoader | None]:
        config = self.config
        chosen = config.eval_data if data is None else data
        if chosen is None:
            yield None
            return
        loader = SoftLabelLoader(
            chosen,
            batch_size=2 * self._batch_size,
            shuffle=False,
            # Filler makes the shares of processes equal, and is not counted.
            tail="pad" if ranks.several else "keep",
            preprocessing=self._models[0][1],
            workers=workers,
            cache_mb=config.cache_mb,
            cache_device=ranks.device if config.cache == "device" else None,
            pin_memory=ranks.device.type == "cuda",
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        with contextlib.closing(loader):
            yield loader

    def make_student(self, number: int, *, ranks: Ranks, temperature: float, steps: int) -> RowStudent:
        config, (model, preprocessing) = self.configs[number], self._models[number]
        settings: dict[str, Any] = {
            "ranks": ranks,
            "precision": self.precision,
            "temperature": temperature if config.temperature is None else config.temperature,
            "steps": steps,
        }
        if config.embedding_loss == "none":
            return RowStudent(config, model, preprocessing, **settings)
        assert self.store is not None
        parts = make_parts(
            config,
            model,
            self._observe_samples(number),
            self.store,
            samples=len(self.source),
            has_labels=self._has_classes,
        )
        return EmbeddingStudent(config, model, preprocessing, parts=parts, **settings)

    def _observe_samples(self, number: int) -> Inputs:
        """A few samples, as the network of a student takes them."""
        assert self._loader is not None
        dataset, preprocessing = self._loader.dataset, self._models[number][1]
        batch = dataset.__getitems__(list(range(min(2, len(dataset)))))
        return preprocessing.finish(Inputs.of(batch.inputs).map(lambda one: one.cpu()))

    def count_units(self, loader: Loader) -> int:
        return len(loader) * self._batch_size

    def describe_data(self, loader: Loader) -> list[str]:
        return [
            f"data {loader.source.name}: {loader.num_samples:,} samples, {len(loader)} steps of {self._batch_size} an "
            "epoch"
        ]

    def describe_labels(self, loader: Loader) -> list[str]:
        assert isinstance(loader, SoftLabelLoader)
        assert loader.store is not None
        views, chosen = loader.store.run.views, self.config.augmentation(loader.store, self.source.inputs)
        if not loader.store.run.view_columns:
            augmented = f"augmentation {chosen}: the soft labels are those of the un-augmented images"
            return [] if chosen == "none" else [augmented]
        used = loader.dataset.views
        which = f"epoch e uses view e mod {used}" if self.config.view_order == "cycle" else "each sample its own"
        lines = [f"views {views.policy['name']}: {used} of each image, as the teacher saw them; {which}"]
        if used < views.count:
            lines.append(
                f"the store has {views.count} views now; this run keeps to the first {used}, with which it began"
            )
        return lines

    def cut(self, batch: Batch) -> tuple[Batch, tuple[tuple[slice, Counts], ...]]:
        batch, counts_B = without_filler(batch)
        filtered = None
        if self._filter is not None:
            batch, filtered = self._filter.apply(batch)
        return batch, cut(batch, counts_B, self.config.accumulate, filtered)

    def prepare(
        self,
        batch: Batch,
        parts: tuple[tuple[slice, Counts], ...],
        whole: Counts,
        students: Sequence[Student],
        *,
        epoch: int,
        step: int,
    ) -> RowStep:
        return prepare(
            batch,
            parts,
            whole,
            [student.preprocessing for student in students],
            epoch=epoch,
            step=step,
            with_teacher=any(student.config.soft_weight > 0 for student in students),
            negatives=None if self._draws is None else self._draws.draw(epoch, step),
        )

    def measure(self, student: Student, loader: Loader) -> Measurement:
        return Measurement(
            student.evaluated.eval(),
            preprocessing=student.preprocessing,
            device=student.device,
            precision=student.precision,
            source=loader.source,
            activation=self.activation,
        )


def _build(config: StudentConfig, num_classes: int, kind: str) -> tuple[nn.Module, InputTransform]:
    torch.manual_seed(config.shared.seed)  # each by itself: what a student starts from does not depend on the others
    model = build_model(config.network, num_classes=num_classes)
    if isinstance(model, Program):
        raise SpecError(f"student {config.student}: a file that is run as it is cannot be trained; name a network")
    return model, student_preprocessing(config.network, model, kind)


def _check_dot(config: StudentConfig, precision: str) -> None:
    """Raises UsageError for a student that has not both gradients of optimizer dot."""
    for name in ("soft_weight", "hard_weight"):
        if not getattr(config, name):
            raise UsageError(
                f"optimizer: dot keeps the gradients of the soft and of the hard term apart, student {config.name} has "
                f"{name} 0; give one above 0, or use sgd"
            )
    if precision == "fp16":
        raise UsageError(
            "precision: the scaling of fp16 is of one gradient a step, optimizer dot has two; use bf16 or fp32"
        )


def _check_geometry(configs: Sequence[StudentConfig], found: list[InputTransform]) -> None:
    """Students of one pass get the same pixels; how they are normalised is each student's own."""
    for config, preprocessing in zip(configs, found, strict=True):
        if preprocessing.shape != found[0].shape:
            raise UsageError(
                f"student {config.student}: takes {preprocessing.fit_in_words}, and {configs[0].student} "
                f"{found[0].fit_in_words}; students of one pass share their inputs: give them one size, or train them "
                "apart"
            )


def _augment(config: TrainConfig, store: Store | None, kind: InputKind) -> CropFlip | None:
    chosen = config.augmentation(store, kind)
    return None if chosen == "none" else CropFlip(padding=config.crop_padding, flip=chosen == "crop-flip")


def _list_features(configs: Sequence[StudentConfig]) -> tuple[BatchFeature, ...]:
    """What batches need of the teacher beside its labels."""
    differences: tuple[BatchFeature, ...] = (DIFFERENCE,) if any(one.difference_weight for one in configs) else ()
    return (*list_features(configs), *differences)


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
