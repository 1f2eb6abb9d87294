"""What a sample is before a network sees it, and how a network takes a batch of them.

Legend: B batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from softlabel.errors import BadImageError

IGNORE = -100  # label of an unlabelled sample
_SINGLE = "x"  # name of the only tensor of a sample


# One text, or a pair of them.
Text: TypeAlias = str | tuple[str, str]
# A sample as a source has it: encoded bytes, pixels or numbers of a dataset that decodes by itself, arrays by the names
# of a network's inputs, a document, or why it could not be read.
Raw: TypeAlias = "bytes | Text | Image.Image | NDArray[Any] | Tensor | Mapping[str, Any] | TokenIds | BadImageError"
# A decoded sample, without a batch axis.
Item: TypeAlias = Tensor | dict[str, Tensor] | Text
# In the shape that a network takes.
Fitted: TypeAlias = Tensor | dict[str, Tensor]
# Its shape and type, by the name of each tensor.
Form: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
# Decoded, uint8: (B, 3, H, W), or B of (3, H, W) of any sizes.
Images: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Choices in decoding that change the pixels.

    Attributes:
        upright: apply the EXIF orientation of encoded images.
        bits: bits used by 16-bit grey images; None: not determined.
    """

    upright: bool = True
    bits: int | None = None

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Self:
        """Restore from `to_dict`."""
        return cls(upright=recorded.get("exif", "upright") == "upright", bits=recorded.get("bits"))

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for a manifest, without default values."""
        exif = {} if self.upright else {"exif": "ignore"}
        return exif if self.bits is None else {**exif, "bits": self.bits}

    def options(self) -> str:
        """Return the options of a SOURCE that select this decoding."""
        return f"'?exif={'upright' if self.upright else 'ignore'}{'' if self.bits is None else f'&bits={self.bits}'}'"


AS_USUAL = Decoding()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenIds:
    """A document as a language model takes it.

    Attributes:
        ids: int32 (L,), the ids of its tokens, those that a tokenizer adds among them.
        mask: uint8 (L,), 1 where what comes after the token counts.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample as the source has it; its source's `InputKind` decodes `raw`.

    `label` is a class number, or, where a sample may have several classes at once, int8 (C,): 1, 0 or -1 (unknown).
    """

    key: str
    raw: Raw
    label: int | NDArray[np.int8] = IGNORE
    decoding: Decoding = AS_USUAL


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """B samples as a network takes them: tensors by name, each with B as its first axis.

    A network with one input is called with its tensor, one with several by their names.

    Attributes:
        tensors: by the names of the network's inputs.
        truncated: of a batch that was just collated: how many samples were longer than the network takes.
    """

    tensors: Mapping[str, Tensor]
    truncated: int = 0

    @classmethod
    def single(cls, tensor: Tensor) -> Self:
        """The only input of a network; its name does not matter."""
        return cls({_SINGLE: tensor})

    @classmethod
    def of(cls, plain: "Tensor | Mapping[str, Tensor]") -> Self:
        """From a tensor, or tensors by name."""
        return cls.single(plain) if isinstance(plain, Tensor) else cls(plain)

    @property
    def plain(self) -> "Tensor | dict[str, Tensor]":
        """A tensor, or, of several inputs, tensors by name."""
        return self.only if len(self.tensors) == 1 else dict(self.tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Self:
        """Some of the samples."""
        return self.map(lambda tensor: tensor[rows])

    @property
    def only(self) -> Tensor:
        """The tensor of a network with one input."""
        (tensor,) = self.tensors.values()
        return tensor

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each tensor, without the batch."""
        return tuple(tuple(tensor.shape[1:]) for tensor in self.tensors.values())

    @property
    def form(self) -> Form:
        """Of each sample; see `form_of`."""
        return {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same names with other tensors."""
        return type(self)({name: change(tensor) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Self:
        """On a device, without waiting, in the same memory layout."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def padded(self, batch_size: int) -> Self:
        """Filled up with zeros to a batch of this size, in the same memory layout: another one could be computed in
        another way."""
        return self if len(self) == batch_size else self.map(lambda tensor: _pad(tensor, batch_size))

    def call(self, network: Callable[..., Any]) -> Any:
        """What a network answers."""
        return network(self.only) if len(self.tensors) == 1 else network(**self.tensors)

    @classmethod
    def join(cls, parts: Sequence["Inputs"]) -> "Inputs":
        """Batches one after the other."""
        names = parts[0].tensors
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in names})


def _pad(tensor: Tensor, batch_size: int) -> Tensor:
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last and not tensor.is_contiguous() else torch.contiguous_format
    whole = torch.zeros((batch_size, *tensor.shape[1:]), dtype=tensor.dtype).contiguous(memory_format=layout)
    whole[: len(tensor)] = tensor
    return whole


def form_of(item: Fitted) -> Form:
    """Return the shape and type of a fitted sample, by the name of each tensor."""
    tensors = {_SINGLE: item} if isinstance(item, Tensor) else item
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class InputKind(ABC):
    """What the samples of a source are, before any network sees them.

    Attributes:
        name: as a manifest records it.
        unit: of bars and of training's log.
        noun: several samples in a sentence.
        view_steps: which steps of a view policy it takes; None: all.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    noun: ClassVar[str] = "samples"
    view_steps: ClassVar[frozenset[str] | None] = None

    @classmethod
    def takes(cls, step: str) -> bool:
        """Whether views of its samples may have a step."""
        return cls.view_steps is None or step in cls.view_steps

    def __eq__(self, other: object) -> bool:
        """Whether both treat samples alike, also after a trip to another process: one class, equal attributes."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @abstractmethod
    def decode(self, sample: Sample) -> tuple[Item, int]:
        """The decoded sample and its content hash.

        Raises:
            BadImageError: this sample is damaged; the text is the reason alone.
            DataError: samples of this form cannot be meant.
        """

    @abstractmethod
    def content_hash(self, raw: Raw) -> int | None:
        """64 bits of what the source gave, not 0; None where there is nothing to hash."""


class InputTransform(ABC):
    """How one network takes a sample: brought to its shape on the host, one by one, and finished on the device."""

    kind: ClassVar[str]
    # Of the network's weights. Convolutions are fastest channels-last, other networks may depend on the order of axes.
    memory_format: ClassVar[torch.memory_format] = torch.contiguous_format
    # What a user can do where a network does not take the samples as they come out.
    remedy: ClassVar[str]
    # What of it a SPEC or its folder chooses.
    spec_options: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> Hashable:
        """What `fit` depends on: members that are equal in it share one batch."""

    @property
    @abstractmethod
    def norm(self) -> Hashable:
        """What `finish` depends on."""

    @property
    @abstractmethod
    def fixes_size(self) -> bool:
        """Whether samples of every size come out with the same one."""

    @abstractmethod
    def fit(self, item: Item, *, fixed: bool = False) -> Fitted:
        """A decoded sample in this network's shape; the same tensor where it has it already.

        Args:
            item: the sample.
            fixed: its size was chosen with its view.

        Raises:
            BadImageError: it cannot be brought to that shape.
            DataError: it is nothing that this network takes.
        """

    @abstractmethod
    def collate(self, items: Sequence[Fitted]) -> Inputs:
        """Samples of one shape as a batch."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that a batch may have, where the samples of a batch are brought to one of several: what a network
        answers to a sample is always computed at the sample's own. Empty: all have one shape."""
        return ()

    def bucket_of(self, inputs: Inputs) -> Tensor:
        """int64 (B,): which of the `buckets` each sample belongs to."""
        raise NotImplementedError(f"{self.kind}: samples have one shape")

    def cut(self, inputs: Inputs, bucket: int | None = None) -> Inputs:
        """A batch at the length of a bucket, or of the longest that a sample of it needs."""
        return inputs

    @abstractmethod
    def finish(self, inputs: Inputs) -> Inputs:
        """The last step, on the device: normalisation."""

    @abstractmethod
    def example(self, rows: int) -> Inputs | None:
        """Made-up samples before `finish`, each another one; None where the shape is not known."""

    @abstractmethod
    def describe(self, shape: Sequence[int]) -> str:
        """The size of one sample in words."""

    @property
    @abstractmethod
    def fit_in_words(self) -> str:
        """What `fit` makes of samples."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
