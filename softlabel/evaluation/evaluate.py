"""How good a model is: accuracy, cross-entropy, calibration, and how far it is from the teacher of a store.

Legend: B batch, C classes, N samples.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from softlabel.common.activation import Activation
from softlabel.common.arguments import check_arguments
from softlabel.common.device import resolve_device
from softlabel.common.spec import parse_spec
from softlabel.dataset import Source, first_samples, open_source, report_source, require_samples
from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.language import evaluate_language_model
from softlabel.evaluation.metrics import Evaluation, Totals
from softlabel.evaluation.multi_label import MultiLabelTotals
from softlabel.evaluation.network import build_network, compute_logits, evaluating, spec_of
from softlabel.inputs.base import InputTransform
from softlabel.inputs.tokens import TOKENS
from softlabel.inputs.transforms import default_transform
from softlabel.loader import Batch, Missing, SoftLabelLoader
from softlabel.models import LanguageModel, RunModel, names_language_model, read_run
from softlabel.models.precision import Precision
from softlabel.models.program import Program
from softlabel.store.open import open_store
from softlabel.store.reader import Store


@check_arguments
def evaluate(
    model: str | Path | nn.Module,
    data: "str | Path | Source | Dataset[Any]",
    labels: str | Path | Store | None = None,
    *,
    preprocessing: InputTransform | None = None,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    device: str = "auto",
    workers: int = 0,
    missing: Missing = "error",
    key_fn: Callable[[int], str | int] | None = None,
    progress: bool | None = None,
    activation: Activation | None = None,
) -> Evaluation:
    """Measure a model on a dataset, in eval mode.

    Args:
        model: the folder of a run, a SPEC with a checkpoint, or a module (left in the mode that it was in).
        data: a SOURCE, or a map-style dataset.
        labels: a store of the same data, with which the model is compared too. Where its rows are views, agreement,
            teacher_kl and teacher_accuracy are measured on view 0, in a pass of their own; all else on the images as
            they are.
        preprocessing: how samples are prepared; absent: the model's own, or for a module [0, 1] as they are.
        batch_size: samples a forward pass, absent: 256; of a language model tokens, absent: 8192.
        precision: fp32, bf16 or fp16 (autocast).
        device: auto, cpu, cuda or cuda:N.
        workers: processes that decode.
        missing: error, skip or hard-only, for samples without a row in the store.
        key_fn: index -> key, for a map-style dataset.
        progress: show a bar; absent: if standard error is a terminal.
        activation: softmax, or sigmoid of independent outputs (several labels at once, or one single output), which
            give a `MultiLabelEvaluation`; absent: that of the store, of the run, or what the labels are.

    Returns:
        The figures; those of a language model are a `TokenEvaluation`.

    Raises:
        SpecError: the model cannot be built.
        UsageError: an option that a language model does not have.
        MismatchError: the model's classes are not those of the data or the store.
        DataError, StoreError: data or store cannot be read.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, found {batch_size}")
    target = resolve_device(device)
    source = open_source(data, key_fn=key_fn)
    require_samples(source)
    store = labels if labels is None or isinstance(labels, Store) else open_store(labels)
    if store is not None:
        store.require_labels("evaluate")
    spec = None if isinstance(model, nn.Module) else spec_of(model)
    if isinstance(model, LanguageModel) or (spec is not None and names_language_model(parse_spec(spec))):
        if activation == "sigmoid":
            raise UsageError(f"activation: expected softmax for a language model, found {activation}; leave it out")
        chosen, own = (model, None) if spec is None else build_network(spec, TOKENS.name, precision)
        assert isinstance(chosen, LanguageModel)
        return evaluate_language_model(
            spec or "the network",
            chosen,
            source,
            store,
            transform=preprocessing or own,
            batch_tokens=8192 if batch_size is None else batch_size,
            precision=precision,
            device=target,
            workers=workers,
            missing=missing,
            progress=progress,
        )
    if isinstance(model, nn.Module):
        module = model
        if preprocessing is None:
            preprocessing = default_transform(source.inputs, first_samples(source))
    else:
        assert spec is not None
        module, own = build_network(spec, source.inputs.name, precision)
        preprocessing = preprocessing or own
    report_source(source)
    activation = _choose_activation(activation, spec, source, store)
    if isinstance(module, Program):
        module.activation = activation

    def measured(store: Store | None) -> Evaluation:
        loader = SoftLabelLoader(
            source,
            store,
            batch_size=256 if batch_size is None else batch_size,
            shuffle=False,
            preprocessing=preprocessing,
            missing=missing,
            workers=workers,
            cache_mb=0,
            pin_memory=target.type == "cuda",
        )
        batches = tqdm(loader, desc="evaluating", unit="batch", disable=None if progress is None else not progress)
        return measure(
            module,
            batches,
            preprocessing=preprocessing,
            device=target,
            precision=precision,
            source=source,
            activation=activation,
        )

    with evaluating(module.to(target)):
        if store is None or not store.run.view_columns:
            return measured(store)
        as_it_is, view = measured(None), measured(store)
    return replace(view, **{name: getattr(as_it_is, name) for name in as_it_is.HARD})


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    preprocessing: InputTransform,
    device: torch.device,
    precision: str,
    source: Source,
    activation: Activation = "softmax",
) -> Evaluation:
    """Measure a module, already on `device` and in eval mode, on the batches of a loader over `source`.

    Raises:
        MismatchError: the model's classes are not those of the source.
    """
    measurement = Measurement(
        model, preprocessing=preprocessing, device=device, precision=precision, source=source, activation=activation
    )
    for batch in batches:
        measurement.add(batch.to(device, non_blocking=True))
    return measurement.result()


class Measurement:
    """What `measure` does, batch by batch: for several models that share a pass, or several processes.

    Args:
        model: on `device` and in eval mode.
        source: whose classes the model must have.
        activation: of its outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocessing: InputTransform,
        device: torch.device,
        precision: str,
        source: Source,
        activation: Activation = "softmax",
    ) -> None:
        self._model, self._preprocessing, self._device, self._precision = model, preprocessing, device, precision
        self._source = source
        self._totals = Totals() if activation == "softmax" else MultiLabelTotals(len(source))

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """A batch on the device; rows of weight 0 do not count."""
        logits_BC = compute_logits(
            self._model,
            batch,
            preprocessing=self._preprocessing,
            device=self._device,
            precision=self._precision,
            source=self._source,
        )
        self._totals.add(logits_BC.double(), batch)

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> Evaluation:
        """Of all batches so far.

        Args:
            reduce: adds up a float64 tensor on the CPU over the processes that measure together.
        """
        return self._totals.result(reduce)


def _choose_activation(asked: Activation | None, spec: str | None, source: Source, store: Store | None) -> Activation:
    """What the outputs of a model are taken as, by the first that says it."""
    trained = network.activation if spec is not None and (network := _read_run_of(spec)) is not None else None
    stored = None if store is None else store.run.activation
    said = [("--activation", asked), ("the store", stored), ("the run", trained)]
    known = [(who, what) for who, what in said if what is not None]
    if len({what for _, what in known}) > 1:
        listed = ", ".join(f"{who} says {what}" for who, what in known)
        raise MismatchError(f"model: expected one kind of outputs, found {listed}; compare it with labels of its kind")
    if not known:
        return "softmax" if source.label_width is None else "sigmoid"
    who, activation = known[0]
    if activation == "softmax" and source.label_width is not None and source.has_labels:
        raise MismatchError(
            f"labels: {source.name} has several classes at once, {who} says softmax; measure it on labels of one class "
            "each"
        )
    return activation


def _read_run_of(spec: str) -> RunModel | None:
    """What a run says about its student; None for other SPECs."""
    parsed = parse_spec(spec)
    return read_run(parsed.name) if parsed.kind == "run" else None
