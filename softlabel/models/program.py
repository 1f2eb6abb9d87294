"""Networks that can be run but not opened: files that hold their own graph.

Legend: B batch, C classes, H height, W width.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabel.common.spec import Spec
from softlabel.errors import SpecError, TeacherError
from softlabel.inputs.image_transform import Preprocessing


class Program(nn.Module):
    """A file that is run as it is. It has no parameters to train, to stack or to compile, and no last layer to capture.

    Attributes:
        sha256: of the file, and of the files that it refers to.
        batch: the smallest and the largest batch that it takes; None: any.
        described: the preprocessing that the file itself states, in the words of `Preprocessing.to_dict`.
        side: of the square image that it takes; None: any, or not said.
    """

    spec: Spec
    sha256: str
    batch: tuple[int, int | None]
    described: Mapping[str, Any] | None
    side: int | None

    @abstractmethod
    def run(self, images_BCHW: Tensor) -> Any:
        """What the file answers to float32 (B, 3, H, W), with B within `batch`."""

    @abstractmethod
    def place(self, device: torch.device) -> None:
        """Move it. Raises SpecError where it cannot run there."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of a batch of any size, in pieces that the file takes; the last piece is padded."""
        smallest, largest = self.batch
        parts = []
        for part_BCHW in torch.split(images_BCHW.contiguous(), largest or len(images_BCHW)):
            kept = len(part_BCHW)
            if kept < smallest:
                zeros = part_BCHW.new_zeros(smallest - kept, *part_BCHW.shape[1:])
                part_BCHW = torch.cat([part_BCHW, zeros])
            parts.append(logits_of(self.spec.text, self.run(part_BCHW))[:kept])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to(self, *args: Any, **kwargs: Any) -> "Program":
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, (str, torch.device)):
            self.place(torch.device(device))
        return self

    @property
    def preprocessing(self) -> Preprocessing:
        """What the file says of it, or else its size alone beside the mean and std of the SPEC.

        Raises:
            SpecError: neither file nor SPEC state mean and std.
        """
        if self.described is not None:
            try:
                return Preprocessing.from_dict(self.described)
            except SpecError as error:
                raise SpecError(f"{self.spec.text}: {error} in its metadata") from error
        if not {"mean", "std"} <= set(self.spec.options):
            raise SpecError(
                f"{self.spec.text}: does not say how its images are prepared; give mean= and std= (and resize=, "
                "crop=), for values in [0, 1]: ?mean=0,0,0&std=1,1,1 for a network that normalises them itself"
            )
        return Preprocessing(resize=self.side, crop=self.side)


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
