"""Arrays of numbers as samples: spectrograms, tables, images of many bands.

Legend: B batch, C channels, H and W height and width.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import Fitted, InputKind, Inputs, InputTransform, Item, Raw, Sample
from softlabel.inputs.content import hash_array, hash_values

_MOST_BANDS = 64


class TensorKind(InputKind):
    """Numbers of any shape, or several arrays by the names of a network's inputs.

    Floats, bools and unsigned bytes become float32, but float64 stays until the transform of a network; other integers
    become int64, as class and token ids are.
    """

    name: ClassVar[str] = "tensor"
    unit: ClassVar[str] = "sample"
    view_steps: ClassVar[frozenset[str] | None] = frozenset()

    def decode(self, sample: Sample) -> tuple[Item, int]:
        """See `InputKind.decode`; a number that is not finite makes a sample bad."""
        raw = sample.raw
        if isinstance(raw, BadImageError):
            raise BadImageError(str(raw)) from raw
        if isinstance(raw, Mapping):
            if not raw:
                raise DataError("expected arrays by name, found none")
            return {str(name): _decode(_array_of(value), name) for name, value in raw.items()}, self.content_hash(
                raw
            ) or 0
        array = _array_of(raw)
        return _decode(array, None), hash_array(array)

    def content_hash(self, raw: Raw) -> int | None:
        """Of type, shape and values; of several arrays, of their names too."""
        if isinstance(raw, BadImageError):
            return None
        if isinstance(raw, Mapping):
            parts = [(str(name), hash_array(_array_of(raw[name]))) for name in sorted(raw)]
            return hash_values(
                "".join(f"{name}={value:016x};" for name, value in parts).encode(), "named", (len(parts),)
            )
        return hash_array(_array_of(raw))


class BandsKind(InputKind):
    """Images of 1 to 64 channels: arrays (C, H, W) of 8 or 16 bits, or floats.

    uint8 stays as it is; uint16 becomes float32 from 0 to 1; int8, int16 and floats have no agreed range and become
    float32 as they are.
    """

    name: ClassVar[str] = "image"
    unit: ClassVar[str] = "img"
    noun: ClassVar[str] = "images"
    view_steps: ClassVar[frozenset[str] | None] = frozenset({"crop-flip", "inception"})

    def decode(self, sample: Sample) -> tuple[Item, int]:
        """See `InputKind.decode`."""
        raw = sample.raw
        if isinstance(raw, BadImageError):
            raise BadImageError(str(raw)) from raw
        array = _array_of(raw)
        if array.ndim != 3 or not 1 <= array.shape[0] <= _MOST_BANDS:
            raise SpecError(
                f"expected an image of shape (C, H, W) with 1 to {_MOST_BANDS} channels C, found {array.shape}; say "
                "where they are with '?layout=channels-first' or '?layout=channels-last'"
            )
        check_bands(array.dtype)
        content = hash_array(array)
        if array.dtype == np.uint8:
            return torch.from_numpy(np.array(array)), content
        if array.dtype == np.uint16:
            return torch.from_numpy(array.astype(np.float32) / 65535), content
        if array.dtype.kind == "f":
            _check_finite(array, None)
        return torch.from_numpy(_narrow(array, None)), content

    def content_hash(self, raw: Raw) -> int | None:
        """Of type, shape and values."""
        return None if isinstance(raw, BadImageError) else hash_array(_array_of(raw))


TENSORS, BANDS = TensorKind(), BandsKind()


def check_bands(dtype: np.dtype[Any]) -> None:
    """Check the type of images of many bands.

    Raises:
        DataError: integers of more than 16 bits.
    """
    if dtype.kind in "iu" and dtype.itemsize > 2:
        raise DataError(
            f"expected images of uint8, uint16, int8, int16 or floats, found {dtype}; store them as one of these, as "
            "float32 if nothing else holds their values"
        )


def _array_of(value: Any) -> NDArray[Any]:
    """In the byte order of this machine."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16; float32 has the same values.
        return np.asarray(value.float() if value.dtype == torch.bfloat16 else value)
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"expected an array or tensor of numbers, found {type(value).__name__} of type {array.dtype}; let the "
            "dataset return numbers"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _decode(array: NDArray[Any], name: object) -> Tensor:
    if array.dtype.kind == "f":
        _check_finite(array, name)
        # float32 of every network but those that take float64: `TensorTransform.fit`.
        return torch.from_numpy(array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32))
    if array.dtype.kind == "b" or array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32))
    if array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
        raise DataError(
            f"expected integers below 2^63{_describe_name(name)}, found {array.max()}; store them as int64 or floats"
        )
    return torch.from_numpy(array.astype(np.int64))


def _check_finite(array: NDArray[Any], name: object) -> None:
    if not np.isfinite(array).all():
        found = "NaN" if np.isnan(array).any() else "an infinite number"
        raise BadImageError(f"{found}{_describe_name(name)} at {_first_place(~np.isfinite(array))}")


def _narrow(array: NDArray[Any], name: object) -> NDArray[np.float32]:
    """Finite numbers as float32; raises BadImageError where one is beyond its range."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if array.dtype.itemsize > 4 and not (finite := np.isfinite(narrow)).all():
        found = array[~finite].flat[0]
        raise BadImageError(f"{found:g}{_describe_name(name)} at {_first_place(~finite)}, beyond the range of float32")
    return narrow


def _describe_name(name: object) -> str:
    return "" if name is None else f" in {name!r}"


def _first_place(wrong: NDArray[np.bool_]) -> str:
    place = np.argwhere(wrong)[0].tolist()
    return f"position {tuple(place) if len(place) != 1 else place[0]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTransform(InputTransform):
    """How a network takes arrays of numbers: as they are, or normalised along their first axis.

    Attributes:
        mean, std: one number for each place of the first axis (channels, or the columns of a table), or a single one;
            None: the numbers as they are.
        keep_float64: the network takes float64; False: float64 becomes float32.
    """

    kind: ClassVar[str] = "tensor"
    remedy: ClassVar[str] = "give the {network} samples of one shape"
    spec_options: ClassVar[str] = "mean, std"

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    keep_float64: bool = False

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise SpecError("mean and std: expected both or neither")
        if self.mean is not None and self.std is not None:
            check_mean_std(self.mean, self.std)

    @property
    def shape(self) -> Hashable:
        """Samples are taken as they come: all members that take the same floats share one batch."""
        return self.kind, self.keep_float64

    @property
    def norm(self) -> Hashable:
        """Mean and standard deviation."""
        return self.mean, self.std

    @property
    def fixes_size(self) -> bool:
        """Any shape is passed on."""
        return False

    def fit(self, item: Item, *, fixed: bool = False) -> Fitted:
        """The sample itself, float64 as float32 (see `keep_float64`).

        Raises:
            BadImageError: a number is beyond the range of float32.
            SpecError: it has another number of channels than mean and std, or several arrays.
            DataError: it is a text.
        """
        if isinstance(item, str | tuple):
            raise DataError("expected arrays of numbers, found a text; give a network of texts")
        if self.mean is not None:
            if not isinstance(item, Tensor):
                raise SpecError(f"mean= and std= are of one array, found {', '.join(item)}; leave them out")
            if len(self.mean) not in (1, item.shape[0] if item.dim() else 1):
                numbers, places = ",".join(f"{number:g}" for number in self.mean), item.shape[0] if item.dim() else 1
                raise SpecError(
                    f"expected {len(self.mean)} channels, as mean={numbers} has numbers, found shape "
                    f"{tuple(item.shape)}; give mean= and std= in its SPEC {places} numbers, or a single one "
                    "for all"
                )
        if self.keep_float64:
            return item
        return _as_float32(item, None) if isinstance(item, Tensor) else {k: _as_float32(v, k) for k, v in item.items()}

    def collate(self, items: Sequence[Fitted]) -> Inputs:
        """Stacked, by name where there are several arrays."""
        first = items[0]
        if isinstance(first, Tensor):
            return Inputs.single(torch.stack(items))  # type: ignore[arg-type]
        return Inputs({name: torch.stack([item[name] for item in items]) for name in first})  # type: ignore[index]

    def finish(self, inputs: Inputs) -> Inputs:
        """``(x - mean) / std``, float32; float64 with `keep_float64`."""
        if self.mean is None or self.std is None:
            return inputs
        dtype = torch.float64 if self.keep_float64 else torch.float32
        mean, std = _constants(self.mean, self.std, dtype, inputs.only.device)
        axes = (1, -1) + (1,) * (inputs.only.dim() - 2)
        return inputs.map(lambda tensor: (tensor.to(dtype) - mean.view(axes)) / std.view(axes))

    def example(self, rows: int) -> Inputs | None:
        """Not known before a sample is seen."""
        return None

    def describe(self, shape: Sequence[int]) -> str:
        """Its axes."""
        return f"shape {tuple(shape)}"

    @property
    def fit_in_words(self) -> str:
        """As they are."""
        return "arrays as they are"

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; `from_dict` is the inverse."""
        numbers = {} if self.mean is None or self.std is None else {"mean": list(self.mean), "std": list(self.std)}
        return {"kind": self.kind, **numbers, **({"keep_float64": True} if self.keep_float64 else {})}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "TensorTransform":
        """Restore from `to_dict`.

        Raises:
            SpecError: a field has the wrong type.
        """
        try:
            numbers = {name: tuple(float(x) for x in found[name]) for name in ("mean", "std") if name in found}
        except (TypeError, ValueError) as error:
            raise SpecError(f"preprocessing: expected numbers as mean and std, found {error!r}") from error
        if not isinstance(keep := found.get("keep_float64", False), bool):
            raise SpecError(f"preprocessing: keep_float64: expected true or false, found {keep!r}")
        return cls(**numbers, keep_float64=keep)


def _as_float32(tensor: Tensor, name: object) -> Tensor:
    return tensor if tensor.dtype != torch.float64 else torch.from_numpy(_narrow(tensor.numpy(), name))


def check_mean_std(mean: Sequence[float], std: Sequence[float]) -> None:
    """Check numbers for normalisation.

    Raises:
        SpecError: their numbers differ, one is not finite, or a std is not positive.
    """
    if len(mean) != len(std) or not len(mean):
        raise SpecError(f"mean and std: expected as many numbers of each, found {tuple(mean)} and {tuple(std)}")
    if not np.isfinite(mean).all() or not np.isfinite(std).all() or min(std) <= 0:
        raise SpecError(f"mean and std: expected finite numbers, std above 0, found {tuple(mean)} and {tuple(std)}")


@lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """On the device: copying them there for every batch would make the host wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(mean, dtype=dtype, device=device), torch.tensor(std, dtype=dtype, device=device)
