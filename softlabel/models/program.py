"""Networks that can be run but not opened: files that hold their own graph.

Legend: B batch, C classes or channels, H height, W width.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabel.common.activation import Activation
from softlabel.common.spec import Spec
from softlabel.errors import SpecError, TeacherError
from softlabel.inputs.base import InputTransform
from softlabel.inputs.image_transform import Preprocessing
from softlabel.inputs.tensor import TensorTransform
from softlabel.inputs.transforms import transform_of


class Program(nn.Module):
    """A file that is run as it is. It has no parameters to train, to stack or to compile, and no last layer to capture.

    Attributes:
        sha256: of the file, and of the files that it refers to.
        batch: the smallest and the largest batch that it takes; None: any.
        described: the preprocessing that the file itself states, in the words of `InputTransform.to_dict`.
        shapes: of its inputs by name, without the batch; None for sizes that vary.
        channels_last: its images are (B, H, W, C); see `prepare_for`.
        activation: what its logits are the input of.
        outputs: names of what it can give beside its answer; none if its answer is all there is.
    """

    spec: Spec
    sha256: str
    batch: tuple[int, int | None]
    described: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int | None, ...]]
    channels_last: bool = False
    activation: Activation = "softmax"
    outputs: tuple[str, ...] = ()
    _watched: tuple[str, ...] = ()
    _keep: Sequence[Callable[[object], None]] = ()

    @abstractmethod
    def run(self, tensors: Mapping[str, Tensor], further: Sequence[str] = ()) -> Sequence[Any]:
        """What the file answers to its inputs by name, with B within `batch`, and the values of further outputs."""

    @contextmanager
    def watching(self, names: Sequence[str], keep: Sequence[Callable[[object], None]]) -> Iterator[None]:
        """Hand the value of each of these outputs to its function in every pass; the name of the answer is empty."""
        self._watched, self._keep = tuple(names), keep
        try:
            yield
        finally:
            self._watched, self._keep = (), ()

    @abstractmethod
    def place(self, device: torch.device) -> None:
        """Move it. Raises SpecError where it cannot run there."""

    def forward(self, *single: Tensor, **named: Tensor) -> Tensor:
        """Logits (B, C) of a batch of any size, in pieces that the file takes; the last piece is padded.

        Args:
            single: the input of a file that has one.
            named: inputs by the file's names for them.

        Raises:
            TeacherError: it has other inputs, or does not give logits.
        """
        tensors = dict(zip(self.shapes, single, strict=False)) if len(self.shapes) == 1 and single else named
        if set(tensors) != set(self.shapes):
            found = f"inputs {', '.join(named)}" if named else "one array"
            raise TeacherError(f"expected inputs {self.inputs_in_words}, found {found}")
        if self.channels_last:
            tensors = {name: tensor.permute(0, 2, 3, 1) for name, tensor in tensors.items()}
        count = len(next(iter(tensors.values())))
        smallest, largest = self.batch
        further = [name for name in self._watched if name]
        parts, others = [], []
        for start in range(0, count, largest or count):
            part = {name: tensor[start : start + (largest or count)] for name, tensor in tensors.items()}
            kept = min(count - start, largest or count)
            part = {name: _pad(tensor, smallest).contiguous() for name, tensor in part.items()}
            answer, *others_of = self.run(part, further)
            parts.append(logits_of(self.spec.text, answer)[:kept])
            others.append([one[:kept] for one in others_of])
        logits_BC = parts[0] if len(parts) == 1 else torch.cat(parts)
        values = {name: torch.cat(found) for name, found in zip(further, zip(*others, strict=True), strict=True)}
        for name, keep in zip(self._watched, self._keep, strict=True):
            keep(values[name] if name else logits_BC)
        return logits_BC

    def to(self, *args: Any, **kwargs: Any) -> "Program":
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, (str, torch.device)):
            self.place(torch.device(device))
        return self

    @property
    def inputs_in_words(self) -> str:
        """Their names and shapes."""
        shown = {name: ", ".join(["batch", *(str(size or "any") for size in s)]) for name, s in self.shapes.items()}
        return ", ".join(f"{name} ({sizes})" for name, sizes in shown.items())

    @property
    @abstractmethod
    def takes_float64(self) -> bool:
        """Whether one of its inputs is float64."""

    def example(self) -> Mapping[str, Tensor] | None:
        """A batch of one sample of zeros; None where a size of it is not known."""
        if any(size is None for shape in self.shapes.values() for size in shape):
            return None
        return {name: torch.zeros(1, *shape) for name, shape in self.shapes.items()}  # type: ignore[arg-type]

    def prepare_for(self, kind: str) -> InputTransform:
        """Set it up for samples of a kind.

        Returns:
            What brings samples to its inputs: as the file says, or else, of images, its size alone beside the mean and
            std of the SPEC, and arrays as they are.

        Raises:
            SpecError: neither file nor SPEC state mean and std of images.
            TeacherError: its inputs are no images, and the samples are.
        """
        if kind == TensorTransform.kind:
            found = TensorTransform() if self.described is None else self._described(kind)
            assert isinstance(found, TensorTransform)
            return replace(found, keep_float64=True) if self.takes_float64 else found
        shape = next(iter(self.shapes.values()))
        if len(self.shapes) != 1 or len(shape) != 3 or not (3 in (shape[0], shape[2]) or _is_channels(shape[0])):
            raise TeacherError(
                f"{self.spec.name}: expected one input of images, (batch, 3, height, width) or (batch, height, width, "
                f"3), found {self.inputs_in_words}"
            )
        self.channels_last = shape[0] != 3 and shape[2] == 3
        if self.described is not None:
            return self._described(kind)
        if not {"mean", "std"} <= set(self.spec.options):
            raise SpecError(
                f"{self.spec.text}: does not say how its images are prepared; give mean= and std= (and resize=, "
                "crop=), for values in [0, 1]: ?mean=0,0,0&std=1,1,1 for a network that normalises them itself"
            )
        height, width = shape[:2] if self.channels_last else shape[1:]
        side = height if height == width else None
        return Preprocessing(resize=side, crop=side)

    def _described(self, kind: str) -> InputTransform:
        assert self.described is not None
        try:
            found = transform_of(self.described)
        except SpecError as error:
            raise SpecError(f"{self.spec.text}: {error} in its metadata") from error
        if found.kind != kind:
            raise SpecError(f"{self.spec.text}: takes samples of kind {found.kind} by its metadata, found {kind}")
        return found


def _is_channels(size: int | None) -> bool:
    return size is not None and 1 <= size <= 64


def _pad(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return tensor if missing <= 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def refuse_precision(spec: Spec, model: nn.Module, precision: str) -> None:
    """Raises SpecError where a precision is asked of a file whose precision is its own."""
    if isinstance(model, Program) and precision != "fp32":
        raise SpecError(
            f"{spec.text}: --precision {precision} does not apply: a {Path(spec.name).suffix} file computes in the "
            "types that it was exported with; export it in that precision, or use fp32"
        )


def file_sha256(*paths: Path) -> str:
    """SHA-256 of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def logits_of(subject: str, output: object) -> Tensor:
    """The tensor of logits in what a network returns: itself, or its `logits`, as Hugging Face models have it.

    Raises:
        TeacherError: there is none.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TeacherError(
            f"{subject}: expected a tensor of logits (batch, classes), found {type(output).__name__}; wrap the "
            "network in one that returns its logits alone"
        )
    if output.dim() != 2 or not output.is_floating_point():
        raise TeacherError(
            f"{subject}: expected float logits of shape (batch, classes), found {output.dtype} {tuple(output.shape)}"
        )
    return output
