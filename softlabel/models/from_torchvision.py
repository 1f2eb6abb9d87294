"""``torchvision:NAME``: its classifiers, its published weights, and the input that those were published with."""

import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softlabel.common.spec import Spec, literal
from softlabel.errors import SpecError
from softlabel.inputs.image_transform import Preprocessing
from softlabel.models.options import says_everything
from softlabel.models.program import file_sha256

log = logging.getLogger("softlabel")

# Their published weights want values in [-1, 1]: torchvision normalises with ImageNet's mean and std and has the
# network undo it (`transform_input`). Here the preprocessing says it directly, which is the same.
_SYMMETRIC = ("googlenet", "inception_v3")
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


def torchvision_builder(spec: Spec, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """torchvision's function for this name. `weights` are resolved here, in `options`.

    Raises:
        SpecError: torchvision has no such network, or no such weights.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if spec.name not in names:
        close = get_close_matches(spec.name, names, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f": {', '.join(names)}"
        raise SpecError(f"{spec.text}: torchvision has no image classification model {spec.name!r}{hint}")
    if options.get("weights") is not None:
        if spec.checkpoint:
            raise SpecError(f"{spec.text}: give either a checkpoint after '@' or weights=, not both")
        options["weights"] = torchvision_weights(spec)
        if spec.name in _SYMMETRIC:
            options.setdefault("transform_input", False)
    if spec.checkpoint and spec.name in _SYMMETRIC:
        options.setdefault("init_weights", False)  # minutes of drawing what the file replaces
    builder: Callable[..., nn.Module] = models.get_model_builder(spec.name)
    return builder


def torchvision_weights(spec: Spec) -> Any:
    """The entry of torchvision's list of weights that ``?weights=`` names (None when it is not given).

    Raises:
        SpecError: there are no such weights for this network.
    """
    wanted = spec.options.get("weights")
    if spec.kind != "torchvision" or wanted is None or literal(wanted) is None:
        return None
    entries = _entries(spec)
    name = wanted.rpartition(".")[2]
    if name not in entries.__members__:
        raise SpecError(
            f"{spec.text}: expected weights={' or '.join([*entries.__members__, 'DEFAULT'])}, found {wanted!r}"
        )
    return entries[name]


def published_weights(sha256: str, entries: Iterable[Any]) -> Any:
    """The entry whose file has this SHA-256, of which torchvision puts the first 8 digits into the file's name.

    Args:
        sha256: of a file, in hexadecimal digits.
        entries: members of a `torchvision.models.WeightsEnum`.

    Returns:
        The entry, or None: the file is none of them.
    """
    for entry in entries:
        found = _DIGEST.search(entry.url)
        if found is not None and sha256.startswith(found[1]):
            return entry
    return None


def size_of_weights(spec: Spec, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The `image_size` of a vision transformer, which its weights fix: published ones come in 224, 384, 512 and 518."""
    embedding, patches = weights.get("encoder.pos_embedding"), weights.get("conv_proj.weight")
    if spec.kind != "torchvision" or not spec.name.startswith("vit_") or embedding is None or patches is None:
        return {}
    side = math.isqrt(embedding.shape[1] - 1)
    return {"image_size": side * patches.shape[-1]}


def torchvision_preprocessing(spec: Spec, model: nn.Module | None) -> Preprocessing:
    """The input that published weights were published with; of other files, that of the network's first ones.

    What is assumed of a file is logged.

    Raises:
        SpecError: there is no such network, or no such weights.
    """
    if spec.options.get("weights") is None and spec.checkpoint is None:  # a student that begins at random
        return Preprocessing(resize=256, crop=224)
    entry = torchvision_weights(spec)
    if entry is None and spec.checkpoint is not None:
        entry = published_weights(_sha256(spec.checkpoint), _entries(spec))
        if entry is not None:
            log.info("%s: the published weights %s, prepared as these were published", spec.text, entry)
    known = entry is not None
    if entry is None:
        entry = _first_fitting(spec, model)
    if entry is None:
        return Preprocessing(resize=256, crop=224)
    preset = entry.transforms()
    mean, std = tuple(preset.mean), tuple(preset.std)
    if spec.name in _SYMMETRIC and literal(spec.options.get("transform_input", "false")) is not True:
        mean = std = (0.5, 0.5, 0.5)
    found = Preprocessing(
        mean=mean,
        std=std,
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
    )
    if not known and not says_everything(spec):
        log.info(
            "%s: the file is none of torchvision's published weights; what the SPEC leaves open is prepared as for "
            "%s: %s",
            spec.text,
            entry,
            found.describe_others(spec.options),
        )
    return found


def _entries(spec: Spec) -> Any:
    from torchvision import models

    return models.get_model_weights(spec.name)


def _first_fitting(spec: Spec, model: nn.Module | None) -> Any:
    """The network's first weights, of those for its size of image where it has one."""
    entries = list(_entries(spec))
    size = getattr(model, "image_size", None)
    fitting = [entry for entry in entries if size in (None, entry.transforms().crop_size[0])]
    return next(iter(fitting or entries), None)


def _sha256(path: str) -> str:
    status = Path(path).stat()
    return _hashed(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _hashed(path: str, size: int, changed: int) -> str:
    """A large file is hashed once for its network and its preprocessing."""
    return file_sha256(Path(path))
