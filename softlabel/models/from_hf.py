"""``hf:NAME_OR_FOLDER``: image classifiers of Hugging Face transformers, and what their image processors do.

Nothing is downloaded unless ``download=true`` asks for it, no code of a repository is run, and weights are read from
safetensors alone.

Legend: B batch, C classes, H height, W width.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabel.common.activation import Activation
from softlabel.common.file_type import describe_content
from softlabel.common.spec import Spec, literal
from softlabel.errors import SpecError, one_line
from softlabel.inputs.image_transform import Preprocessing
from softlabel.models.options import refuse_others, says_everything

# How PIL numbers its filters, which image processors record. PIL's nearest takes the pixel in the middle.
_RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
# PIL and torchvision round differently within a resize; anything above is another geometry.
_LEVELS = 2.5


class HuggingFaceClassifier(nn.Module):
    """A classifier of transformers whose answer is the tensor of its logits."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.network(pixel_values=images_BCHW).logits
        return logits_BC

    @property
    def config(self) -> dict[str, Any]:
        """The architecture as JSON, from which `hf_from_config` builds it again."""
        return config_of(self.network)


def config_of(network: Any) -> dict[str, Any]:
    """The architecture of a network of transformers as JSON, every field of it."""
    found: dict[str, Any] = json.loads(network.config.to_json_string(use_diff=False))
    return found


def build_hf(spec: Spec, num_classes: int | None) -> nn.Module:
    """The classifier with its weights, or with ``pretrained=false`` its architecture alone, drawn at random.

    Raises:
        SpecError: transformers is not installed, or the files are not there, or do not fit.
    """
    transformers = import_transformers(spec)
    refuse_others(spec, ("download", "pretrained", "num_classes"))
    option = literal(spec.options.get("num_classes", "null"))
    if option is not None and num_classes not in (None, option):
        raise SpecError(f"{spec.text}: num_classes={option}, but {num_classes} classes are needed here")
    wanted = num_classes if option is None else option
    refuse_wrong_files(spec)
    try:
        config = transformers.AutoConfig.from_pretrained(spec.name, **_where(spec))
        if literal(spec.options.get("pretrained", "true")) is False:
            return hf_from_config(spec, config.to_dict(), wanted)
        if wanted not in (None, config.num_labels):
            raise SpecError(
                f"{spec.text}: has {config.num_labels} classes, but {wanted} are needed here; with pretrained=false it "
                "begins at random, with any number of classes"
            )
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            spec.name, config=config, use_safetensors=True, output_loading_info=True, **_where(spec)
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if "Unrecognized configuration class" in str(error):  # followed by a list of all others
            raise SpecError(
                f"{spec.text}: expected an image classifier, found a network of model type {config.model_type!r}; give "
                f"text:{spec.name} if it classifies texts"
            ) from error
        raise SpecError(f"{spec.text}: {describe_error(error)}; {_remedy(spec)}") from error
    # transformers would draw at random what the file lacks, and only warn.
    if missing := sorted(info["missing_keys"]):
        raise SpecError(
            f"{spec.text}: expected the weights of an image classifier, but {len(missing)} of its tensors are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
    return HuggingFaceClassifier(model.float())  # transformers keeps the file's type, half of them float16


def hf_from_config(spec: Spec, config: Mapping[str, Any], num_classes: int | None) -> nn.Module:
    """The image classifier that a config describes, with random weights; see `network_of_config`."""
    return HuggingFaceClassifier(network_of_config(spec, config, num_classes, "AutoModelForImageClassification"))


def network_of_config(spec: Spec, config: Mapping[str, Any], num_classes: int | None, auto: str) -> Any:
    """The network of transformers that a config describes, float32, with random weights.

    Args:
        spec: the SPEC that is being built.
        config: as JSON has it.
        num_classes: absent: as the config has it.
        auto: the class of transformers that chooses the architecture.

    Raises:
        SpecError: transformers is not installed, or does not know the architecture.
    """
    transformers = import_transformers(spec)
    fields = {k: v for k, v in config.items() if k not in ("auto_map", "_name_or_path", "transformers_version")}
    if num_classes is not None and num_classes != len(fields.get("id2label") or ()):
        fields = {k: v for k, v in fields.items() if k not in ("id2label", "label2id")} | {"num_labels": num_classes}
    try:
        described = transformers.AutoConfig.for_model(**fields)
        network = getattr(transformers, auto).from_config(described, trust_remote_code=False)
    except (TypeError, ValueError, KeyError) as error:
        raise SpecError(
            f"{spec.text}: no {auto.removeprefix('AutoModelFor')} can be built from its config: {describe_error(error)}"
        ) from error
    return network.float()


def refuse_other_heads(spec: Spec, model: nn.Module, activation: Activation = "softmax") -> None:
    """Raises SpecError for a network whose answers are said to be logits of something else."""
    if not isinstance(model, HuggingFaceClassifier):
        return
    problem = getattr(model.network.config, "problem_type", None)
    if problem == "regression":
        raise SpecError(
            f"{spec.text}: expected a classifier, found problem_type=regression in its config: its output is a "
            "quantity, not a logit, with either --activation; give a classifier. If it was trained with a sigmoid or "
            "softmax after all, remove problem_type from config.json"
        )
    if activation == "sigmoid" and problem == "multi_label_classification":
        return
    if activation == "sigmoid" and problem is not None:
        raise SpecError(
            f"{spec.text}: expected independent sigmoids, found problem_type={problem} in its config; leave "
            "--activation sigmoid out. If it was trained with sigmoids after all, remove problem_type from config.json"
        )
    if problem not in (None, "single_label_classification"):
        sigmoid = "; give --activation sigmoid" if problem == "multi_label_classification" else ""
        raise SpecError(
            f"{spec.text}: expected a classifier of one class out of several, found problem_type={problem} in its "
            f"config: its answers are not meant for a softmax{sigmoid}. If it was trained as a classifier after all, "
            "remove problem_type from config.json"
        )


def class_names_of(model: nn.Module) -> tuple[str, ...] | None:
    """A network's own names of its classes: `id2label`, or the `class_names` of what a factory returns."""
    if isinstance(model, HuggingFaceClassifier):
        names = model.network.config.id2label or {}
        found = [str(names[number]) for number in sorted(names)]
        return None if not found or all(re.fullmatch(r"LABEL_\d+", name) for name in found) else tuple(found)
    given = getattr(model, "class_names", None)
    return tuple(map(str, given)) if isinstance(given, (list, tuple)) else None


def hf_preprocessing(spec: Spec) -> Preprocessing:
    """What the image processor beside the weights does, checked against the processor itself on a probe.

    Raises:
        SpecError: there is none, or it does something that a `Preprocessing` cannot say.
    """
    if says_everything(spec):
        return Preprocessing()
    transformers = import_transformers(spec)
    remedy = "say it with mean=, std=, resize=, crop= and interpolation="
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(spec.name, **_where(spec))
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise SpecError(
            f"{spec.text}: how it prepares images cannot be read: {describe_error(error)}; {remedy}"
        ) from error
    name = type(processor).__name__
    try:
        found = _preprocessing_of(processor.to_dict())
        far = _farthest(processor, found)
    except (SpecError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise SpecError(f"{spec.text}: its {name} cannot be expressed: {describe_error(error)}; {remedy}") from error
    if far > _LEVELS:
        raise SpecError(
            f"{spec.text}: its {name} does more than resize, crop and normalise (off by {far:.0f} of 255 on a probe); "
            f"if another way does, {remedy}"
        )
    return found


def refuse_wrong_files(spec: Spec) -> None:
    """Raises SpecError for files of the folder that were not fetched: what transformers says of them names no file."""
    folder = Path(spec.name)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]) if folder.is_dir() else []:
        what = describe_content(path)
        if what not in (None, "a safetensors file"):
            raise SpecError(f"{path}: expected a file of transformers, found {what}")


def _preprocessing_of(found: Mapping[str, Any]) -> Preprocessing:
    """An image processor's attributes as geometry and statistics; other classes mean other things by them."""
    scale = 255 * (found["rescale_factor"] if found.get("do_rescale") else 1)
    mean, std = [0.0] * 3, [1.0] * 3
    if found.get("do_normalize"):
        mean, std = list(found["image_mean"]), list(found["image_std"])
    offset = 1.0 if found.get("rescale_offset") else 0.0
    resize, crop, squash = None, None, False
    size = found.get("size") or {}
    edge = size.get("shortest_edge")
    if found.get("do_resize") and found.get("crop_pct") and edge:  # ConvNeXT
        crop, squash = edge, edge >= 384
        resize = edge if squash else int(edge / found["crop_pct"])
    elif found.get("do_resize") and edge and not size.get("longest_edge"):
        resize = edge
    elif found.get("do_resize"):
        resize, squash = _square(size), True
        crop = resize
    if found.get("do_center_crop") and not found.get("crop_pct"):
        crop = _square(found["crop_size"])
    return Preprocessing(
        mean=tuple((m + offset) / scale for m in mean),
        std=tuple(s / scale for s in std),
        resize=resize,
        crop=crop,
        interpolation=_interpolation(found.get("resample")) if resize is not None else "bilinear",
        squash=squash,
        floor_crop=crop is not None and (crop != resize or not squash),
    )


def _square(size: Mapping[str, Any]) -> int:
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise ValueError(f"expected a square size, found {dict(size)}")
    return int(height)


def _interpolation(resample: Any) -> str:
    if resample is None or int(resample) not in _RESAMPLING:
        raise ValueError(f"expected resample {', '.join(map(str, _RESAMPLING))} (nearest, ...), found {resample}")
    return _RESAMPLING[int(resample)]


def _farthest(processor: Any, found: Preprocessing) -> float:
    """How far processor and preprocessing lie apart, in levels of 255, on a wide and on a tall image of noise."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for height, width in ((150, 211), (211, 150)):
        image_CHW = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        theirs_BCHW = processor(image_CHW.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
        ours_BCHW = found.normalize(found.geometry(image_CHW)[None])
        if ours_BCHW.shape != theirs_BCHW.shape:
            raise ValueError(f"expected {tuple(theirs_BCHW.shape[1:])} as it gives, found {tuple(ours_BCHW.shape[1:])}")
        levels_C11 = 255 * torch.tensor(found.std)[:, None, None]
        worst = max(worst, float(((ours_BCHW - theirs_BCHW).abs() * levels_C11).max()))
    return worst


def _where(spec: Spec) -> dict[str, Any]:
    download = literal(spec.options.get("download", "false")) is True
    return {"local_files_only": not download, "trust_remote_code": False}


def _remedy(spec: Spec) -> str:
    if Path(spec.name).is_dir():
        return "expected a folder with config.json and model.safetensors, as save_pretrained writes it"
    return "give a folder with config.json and model.safetensors, or ask for it with ?download=true"


def describe_error(error: Exception) -> str:
    """What a library raised, in one line."""
    return one_line(error).rstrip(".")


def import_transformers(spec: Spec) -> Any:
    """The library, quiet. Raises SpecError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise SpecError(f"{spec.text}: needs transformers ({error}); pip install 'softlabel[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
