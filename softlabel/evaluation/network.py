"""A network that answers batches of a loader: how it is built from a SPEC or a run folder, and called.

Legend: B batch, C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from softlabel.common.device import out_of_memory
from softlabel.common.spec import parse_spec, quote_path
from softlabel.dataset import Source
from softlabel.errors import MismatchError, TeacherError
from softlabel.inputs.base import Inputs, InputTransform
from softlabel.inputs.transforms import describe_failure
from softlabel.loader import Batch
from softlabel.models import build_model, refuse_precision, refuse_random
from softlabel.models.precision import Precision, computing, ieee_float32
from softlabel.models.teacher import student_preprocessing


def spec_of(model: str | Path) -> str:
    """A SPEC; the folder of a run may be given by its path alone."""
    folder = Path(model).expanduser()
    return f"run:{quote_path(str(folder))}" if isinstance(model, Path) or (folder / "model.json").is_file() else model


def build_network(spec: str, kind: str, precision: Precision) -> tuple[nn.Module, InputTransform]:
    """A network with weights, and how it takes samples of a kind.

    Raises:
        SpecError: it cannot be built, or takes samples of another kind.
    """
    parsed = parse_spec(spec)
    refuse_random(parsed)
    module = build_model(spec)
    refuse_precision(parsed, module, precision)
    return module, student_preprocessing(spec, module, kind)


def compute_logits(
    model: nn.Module,
    batch: Batch,
    *,
    preprocessing: InputTransform,
    device: torch.device,
    precision: str,
    source: Source,
) -> Tensor:
    """The logits (B, C) of a batch that is on the device, as `model` is.

    Args:
        source: whose classes the model must have.

    Raises:
        TeacherError: the answer is not logits.
        MismatchError: the model's classes are not those of the source, or it does not take the samples.
    """
    inputs = preprocessing.finish(Inputs.of(batch.inputs))
    with computing(precision, device):
        try:
            logits_BC = inputs.call(model)
        except Exception as error:  # user code, or samples that it was not made for
            if out_of_memory(error):
                raise
            why = describe_failure(preprocessing, inputs, error, network="model")
            raise MismatchError(f"model: {why}") from error
    if not isinstance(logits_BC, Tensor) or logits_BC.dim() != 2:
        raise TeacherError(f"model: expected logits (B, C), found {getattr(logits_BC, 'shape', type(logits_BC))}")
    names = source.class_names if source.has_labels else None
    outputs = logits_BC.shape[1]  # one of independent outputs says whether it is the second of two classes
    if names is not None and len(names) != outputs and (len(names), outputs) != (2, 1):
        raise MismatchError(
            f"model: has {outputs} classes, {source.name} has {len(names)}; measure it on data of its own classes"
        )
    return logits_BC


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode, with float32 as IEEE has it; afterwards in the mode that they were in."""
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with ieee_float32():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)
