"""From samples to batches, for whatever reads them: decode and hash, bring to one shape, collate.

    samples -> decode_samples -> (views of them) -> collate_samples -> Inputs for each transform

A sample that cannot be used is reported by its place, with the reason: labelling makes a bad row of it, training stops.

Legend: B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import Fitted, Form, InputKind, Inputs, InputTransform, Item, Sample, form_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedSamples:
    """B samples, decoded.

    Attributes:
        items: place among the samples -> what the kind decodes to, such as uint8 (3, H, W); in their order, without
            those that failed.
        content: uint64 (B,), the content hash of every sample; 0 where there is none.
        failed: place -> why it cannot be decoded.
    """

    items: dict[int, Any]
    content: NDArray[np.uint64]
    failed: dict[int, str]


def decode_samples(samples: Sequence[Sample], kind: InputKind, *, name: str) -> DecodedSamples:
    """Decode samples and hash what the source gave.

    Args:
        samples: B of them.
        kind: the source's.
        name: of the source.

    Raises:
        DataError: a sample is nothing of this kind; it is named.
    """
    items: dict[int, Any] = {}
    failed: dict[int, str] = {}
    content = np.zeros(len(samples), dtype=np.uint64)
    for place, sample in enumerate(samples):
        try:
            items[place], content[place] = kind.decode(sample)
        except BadImageError as error:
            content[place], failed[place] = kind.content_hash(sample.raw) or 0, str(error)
        except (DataError, SpecError) as error:
            raise type(error)(f"{name}: sample {sample.key!r}: {error}") from error
    return DecodedSamples(items=items, content=content, failed=failed)


def collate_samples(
    items: "Tensor | Sequence[Item]",
    keys: Sequence[str],
    transforms: Sequence[InputTransform],
    *,
    network: str,
    fixed: bool = False,
    form: Form | None = None,
) -> tuple[tuple[Inputs, ...], dict[int, str]]:
    """Bring decoded samples to one shape, once for each transform, and collate them.

    Args:
        items: B samples or views of them, at least one.
        keys: of the samples.
        transforms: each fits the sample itself, never what another one left of it.
        network: what takes them, "teacher" or "student", for the message.
        fixed: they are views of one size, whose crop was chosen with the view (`InputTransform.fit`).
        form: that each must come out with (`form_of`); None: that of the first.

    Returns:
        A batch for each transform, none where no sample fits; and place -> reason of the samples that do not fit one
        of the transforms, which are in none of the batches.

    Raises:
        DataError: samples come out with different shapes or types, or are nothing that a transform takes.
    """
    if isinstance(items, Tensor) and form in (None, form_of(items[0])):
        first = items[0]
        if all(_fit(one, first, keys[0], network=network, fixed=fixed) is first for one in transforms):
            return (Inputs.single(items),) * len(transforms), {}
    batches: list[list[Fitted]] = [[] for _ in transforms]
    failed: dict[int, str] = {}
    for place, item in enumerate(items):
        try:
            fitted = [_fit(one, item, keys[place], network=network, fixed=fixed) for one in transforms]
        except BadImageError as error:
            failed[place] = str(error)
            continue
        for transform, batch, one in zip(transforms, batches, fitted, strict=True):
            _check_form(form_of(one), form or form_of(batch[0] if batch else one), keys[place], transform, network)
            batch.append(one)
    pairs = zip(transforms, batches, strict=True)
    return tuple(transform.collate(batch) for transform, batch in pairs if batch), failed


def _fit(transform: InputTransform, item: Item, key: str, *, network: str, fixed: bool) -> Fitted:
    try:
        return transform.fit(item, fixed=fixed)
    except BadImageError:
        raise
    except (DataError, SpecError) as error:
        raise type(error)(f"sample {key!r} for the {network}: {error}") from error


def _check_form(found: Form, expected: Form, key: str, transform: InputTransform, network: str) -> None:
    """Raise DataError where a sample has another shape or type: stacking would convert it by its neighbours."""
    if found == expected:
        return
    shapes = [_shape_of(form) for form in (expected, found)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"sample {key!r}: expected {transform.describe(shapes[0])} like those before it, found "
            f"{transform.describe(shapes[1])}; {transform.remedy.format(network=network)}"
        )
    name = next(name for name in expected if found[name] != expected[name])
    types = [str(form[name][1]).removeprefix("torch.") for form in (expected, found)]
    where = f"{name!r} of " if len(expected) > 1 else ""
    raise DataError(
        f"sample {key!r}: expected {where}{types[0]} like those before it, found {types[1]}; "
        "give all samples one type, such as float32"
    )


def _shape_of(form: Form) -> tuple[Any, ...]:
    """The shape of a single tensor; of several, each behind its name."""
    if len(form) == 1:
        return next(iter(form.values()))[0]
    return tuple((name, *shape) for name, (shape, _) in sorted(form.items()))


def refuse_failed(failed: dict[int, str], keys: Sequence[str], *, name: str) -> None:
    """Raise for the first image that cannot be used, where there is one.

    Args:
        failed: place -> reason.
        keys: of the images.
        name: of the source.

    Raises:
        DataError: `failed` is not empty.
    """
    for place, reason in failed.items():
        raise DataError(f"{name}: sample {keys[place]!r}: {reason}; repair it or take it out")
