"""How good a model is: accuracy, cross-entropy, calibration, and how far it is from the teacher of a store.

Legend: B batch, C classes, N samples.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from softlabel.common.arguments import check_arguments
from softlabel.common.device import resolve_device
from softlabel.common.spec import parse_spec, quote_path
from softlabel.dataset import Source, open_source, report_source, require_samples
from softlabel.errors import MismatchError, TeacherError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_transform import Preprocessing
from softlabel.loader import Batch, Missing, SoftLabelLoader
from softlabel.loss.signals import teacher_log_probs, top_class
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, Target
from softlabel.models import build_model, refuse_precision, refuse_random
from softlabel.models.teacher import PRECISIONS, student_preprocessing
from softlabel.store.open import open_store
from softlabel.store.reader import Store

BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured; None where there was nothing to measure it on.

    Attributes:
        samples: images.
        labelled: images with a hard label, to which accuracy, cross_entropy and calibration_error refer.
        accuracy: share of images whose most probable class is the label.
        cross_entropy: mean of -log p(label), in nats.
        calibration_error: expected calibration error, 15 bins of equal width (Guo et al. 2017).
        with_teacher: images with a row in the store, to which the following refer.
        agreement: share of images whose most probable class is the teacher's.
        teacher_kl: mean KL(teacher || model) in nats, both at the store's temperature.
        teacher_accuracy: of the teacher's labels, on the images that have both.
        temperature: of the store.
        note: which figures about the teacher its labels cannot give, and why.
    """

    samples: int
    labelled: int
    accuracy: float | None
    cross_entropy: float | None
    calibration_error: float | None
    with_teacher: int = 0
    agreement: float | None = None
    teacher_kl: float | None = None
    teacher_accuracy: float | None = None
    temperature: float | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [("images", f"{self.samples:,}")]
        if self.labelled != self.samples:
            lines.append(("labelled", f"{self.labelled:,}"))
        named = (
            ("accuracy", self.accuracy),
            ("cross-entropy", self.cross_entropy),
            (f"calibration error ({BINS} bins)", self.calibration_error),
            ("agreement with the teacher", self.agreement),
            (f"KL(teacher || model) at T = {self.temperature or 1:g}", self.teacher_kl),
            ("accuracy of the teacher", self.teacher_accuracy),
        )
        lines += [(name, f"{value:.4f}") for name, value in named if value is not None]
        lines += [("teacher", self.note)] if self.note is not None else []
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


@check_arguments
def evaluate(
    model: str | Path | nn.Module,
    data: "str | Path | Source | Dataset[Any]",
    labels: str | Path | Store | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "auto",
    workers: int = 0,
    missing: Missing = "error",
    key_fn: Callable[[int], str | int] | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Measure a model on a dataset, in eval mode.

    Args:
        model: the folder of a run, a SPEC with a checkpoint, or a module (left in the mode that it was in).
        data: a SOURCE, or a map-style dataset.
        labels: a store of the same data, with which the model is compared too. Where its rows are views, agreement,
            teacher_kl and teacher_accuracy are measured on view 0, in a pass of their own; all else on the images as
            they are.
        preprocessing: how images are prepared; absent: the model's own, or for a module [0, 1] as they are.
        batch_size: images a forward pass.
        precision: fp32, bf16 or fp16 (autocast).
        device: auto, cpu, cuda or cuda:N.
        workers: processes that decode.
        missing: error, skip or hard-only, for samples without a row in the store.
        key_fn: index -> key, for a map-style dataset.
        progress: show a bar; absent: if standard error is a terminal.

    Raises:
        SpecError: the model cannot be built.
        MismatchError: the model's classes are not those of the data or the store.
        DataError, StoreError: data or store cannot be read.
    """
    target = resolve_device(device)
    if isinstance(model, nn.Module):
        module = model
        preprocessing = preprocessing or Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    else:
        spec = _spec(model)
        refuse_random(parse_spec(spec))
        module = build_model(spec)
        refuse_precision(parse_spec(spec), module, precision)
        preprocessing = preprocessing or student_preprocessing(spec, module)
    source = open_source(data, key_fn=key_fn)
    require_samples(source)
    report_source(source)
    store = labels if labels is None or isinstance(labels, Store) else open_store(labels, verify="full")

    def measured(store: Store | None) -> Evaluation:
        loader = SoftLabelLoader(
            source,
            store,
            batch_size=batch_size,
            shuffle=False,
            preprocessing=preprocessing,
            missing=missing,
            workers=workers,
            cache_mb=0,
            pin_memory=target.type == "cuda",
        )
        batches = tqdm(loader, desc="evaluating", unit="batch", disable=None if progress is None else not progress)
        return measure(module, batches, preprocessing=preprocessing, device=target, precision=precision, source=source)

    with _eval_mode(module.to(target)):
        if store is None or not store.run.view_columns:
            return measured(store)
        as_it_is, view = measured(None), measured(store)
    beside = ("samples", "labelled", "accuracy", "cross_entropy", "calibration_error")
    return replace(view, **{name: getattr(as_it_is, name) for name in beside})


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str,
    source: Source,
) -> Evaluation:
    """Measure a module, already on `device` and in eval mode, on the batches of a loader over `source`.

    Raises:
        MismatchError: the model's classes are not those of the source.
    """
    measurement = Measurement(model, preprocessing=preprocessing, device=device, precision=precision, source=source)
    for batch in batches:
        measurement.add(batch.to(device, non_blocking=True))
    return measurement.result()


class Measurement:
    """What `measure` does, batch by batch: for several models that share a pass, or several processes.

    Args:
        model: on `device` and in eval mode.
        source: whose classes the model must have.
    """

    def __init__(
        self, model: nn.Module, *, preprocessing: Preprocessing, device: torch.device, precision: str, source: Source
    ) -> None:
        self._model, self._preprocessing, self._device, self._precision = model, preprocessing, device, precision
        self._source = source
        self._totals = _Totals()

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """A batch on the device; rows of weight 0 do not count."""
        images_BCHW = self._preprocessing.normalize(batch.images)
        with autocast(self._device, self._precision):
            logits_BC = self._model(images_BCHW)
        if not isinstance(logits_BC, Tensor) or logits_BC.dim() != 2:
            raise TeacherError(f"model: expected logits (B, C), found {getattr(logits_BC, 'shape', type(logits_BC))}")
        names = self._source.class_names if self._source.has_labels else None
        if names is not None and len(names) != logits_BC.shape[1]:
            raise MismatchError(
                f"model: has {logits_BC.shape[1]} classes, {self._source.name} has {len(names)}; "
                "measure it on data of its own classes"
            )
        self._totals.add(logits_BC.double(), batch)

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> Evaluation:
        """Of all batches so far.

        Args:
            reduce: adds up a float64 tensor on the CPU over the processes that measure together.
        """
        return self._totals.result(reduce)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass has this precision: fp32, bf16 or fp16."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def calibration_error(confidence_N: Tensor, correct_N: Tensor) -> float:
    """Expected calibration error: mean over samples of |accuracy - confidence| of the bin that a sample falls into.

    Args:
        confidence_N: probability of the predicted class, float (N,), above 0.
        correct_N: bool (N,).
    """
    return _ece(*_bins(confidence_N.double(), correct_N))


class _Totals:
    """Sums over batches, float64."""

    NAMES = (
        *("samples", "labelled", "correct", "nats"),
        *("known", "agreed", "known_labelled", "known_correct", "comparable", "teacher_nats"),
    )

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.bins_3K = torch.zeros(3, BINS, dtype=torch.float64)
        self.temperature: float | None = None
        self.unknown = 0.0  # images whose soft labels do not tell a most probable class

    def add(self, logits_BC: Tensor, batch: Batch) -> None:
        counts_B = torch.ones_like(batch.labels, dtype=torch.bool) if batch.weight is None else batch.weight > 0
        labelled_B = (batch.labels != IGNORE) & counts_B
        labels_B = batch.labels[labelled_B]
        if len(labels_B) and int(labels_B.max()) >= logits_BC.shape[1]:
            raise MismatchError(f"model: has {logits_BC.shape[1]} classes, the data has label {int(labels_B.max())}")
        log_probs_BC = F.log_softmax(logits_BC, dim=1)
        best_B = log_probs_BC.argmax(dim=1)
        correct_B = best_B[labelled_B] == labels_B
        confidence_B = log_probs_BC.amax(dim=1).exp()[labelled_B]
        self.bins_3K += torch.stack(_bins(confidence_B, correct_B)).cpu()
        self._sum(
            samples=counts_B.sum(),
            labelled=len(labels_B),
            correct=correct_B.sum(),
            nats=F.nll_loss(log_probs_BC[labelled_B], labels_B, reduction="sum"),
        )
        if batch.target is not None:
            known_B = counts_B if batch.has_target is None else counts_B & batch.has_target
            self._add_teacher(logits_BC[known_B], best_B[known_B], batch.target.take(known_B), batch.labels[known_B])

    def _add_teacher(self, logits_BC: Tensor, best_B: Tensor, target: Target, labels_B: Tensor) -> None:
        if target.num_classes != logits_BC.shape[1]:
            raise MismatchError(f"model: has {logits_BC.shape[1]} classes, the store has {target.num_classes}")
        self.temperature = target.temperature
        teacher_B = top_class(target)
        if teacher_B is None:
            self.unknown += len(best_B)
            return
        labelled_B = labels_B != IGNORE
        self._sum(
            known=len(best_B),
            agreed=(best_B == teacher_B).sum(),
            known_labelled=labelled_B.sum(),
            known_correct=(teacher_B == labels_B)[labelled_B].sum(),
        )
        if isinstance(target, DenseTarget | Int8Target | HeadTarget):
            log_p_BC = teacher_log_probs(target, torch.float64)
            log_q_BC = F.log_softmax(logits_BC / target.temperature, dim=1)
            p_BC = log_p_BC.exp()
            self._sum(
                comparable=len(best_B),
                teacher_nats=torch.where(p_BC > 0, p_BC * (log_p_BC - log_q_BC), 0.0).sum(),
            )

    def _sum(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.sums[name] += float(value)

    def result(self, reduce: Callable[[Tensor], Tensor] | None) -> Evaluation:
        sums, bins_3K, unknown = self.sums, self.bins_3K, self.unknown
        if reduce is not None:
            flat = torch.tensor([*sums.values(), unknown], dtype=torch.float64)
            flat = reduce(torch.cat([flat, bins_3K.ravel()]))
            *totals, unknown = flat[: len(sums) + 1].tolist()
            sums, bins_3K = dict(zip(sums, totals, strict=True)), flat[len(sums) + 1 :].reshape(3, BINS)

        def mean(name: str, count: str) -> float | None:
            return sums[name] / sums[count] if sums[count] else None

        note = None
        if unknown:
            note = "the store holds classes drawn from the teacher, which do not tell its most probable one"
        elif sums["known"] and not sums["comparable"]:
            note = "the store holds the teacher's largest classes alone: no KL divergence over all of them"
        return Evaluation(
            samples=int(sums["samples"]),
            labelled=int(sums["labelled"]),
            accuracy=mean("correct", "labelled"),
            cross_entropy=mean("nats", "labelled"),
            calibration_error=_ece(*bins_3K) if sums["labelled"] else None,
            with_teacher=int(sums["known"]),
            agreement=mean("agreed", "known"),
            teacher_kl=mean("teacher_nats", "comparable"),
            teacher_accuracy=mean("known_correct", "known_labelled"),
            temperature=self.temperature,
            note=note,
        )


def _bins(confidence_N: Tensor, correct_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, summed confidence and correct answers of each bin (lower, upper], float64 (BINS,)."""
    bin_N = (confidence_N * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    zeros_K = torch.zeros(BINS, dtype=torch.float64, device=confidence_N.device)
    return (
        zeros_K.index_add(0, bin_N, torch.ones_like(confidence_N)),
        zeros_K.index_add(0, bin_N, confidence_N),
        zeros_K.index_add(0, bin_N, correct_N.double()),
    )


def _ece(samples_K: Tensor, confidence_K: Tensor, correct_K: Tensor) -> float:
    # Counts cancel: count / N * |correct / count - confidence / count|.
    return float((correct_K - confidence_K).abs().sum() / samples_K.sum())


def _spec(model: str | Path) -> str:
    """A SPEC; the folder of a run may be given by its path alone."""
    folder = Path(model).expanduser()
    return f"run:{quote_path(str(folder))}" if isinstance(model, Path) or (folder / "model.json").is_file() else model


class _eval_mode:  # noqa: N801 - a context manager
    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.training)
