"""``text:FOLDER``: classifiers of texts of Hugging Face transformers, each with the tokenizer of its folder.

Nothing is downloaded, no code of a folder is run, and weights are read from safetensors alone.

Legend: B batch, C classes, L positions.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from softlabel.common.spec import Spec
from softlabel.errors import SpecError
from softlabel.inputs.json_object import read_object
from softlabel.inputs.text import TextTransform
from softlabel.inputs.tokenizer import TOKENIZER, Tokenizer
from softlabel.models.from_hf import (
    HuggingFaceClassifier,
    describe_error,
    import_transformers,
    network_of_config,
    refuse_wrong_files,
)
from softlabel.models.options import parse_buckets, parse_count

_AUTO = "AutoModelForSequenceClassification"
_EXPECTED = f"expected a folder with config.json, model.safetensors and {TOKENIZER}, as save_pretrained writes them"
_OPTIONS = ("layers", "max_length", "buckets", "num_classes")
# Tokens of a text where the folder says nothing: what attention costs grows with the square.
_LONGEST = 512
# Their first position is behind that of the token that fills up.
_SHIFTED = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet", "longformer")


class TextClassifier(HuggingFaceClassifier):
    """A classifier of transformers whose answer is the tensor of its logits, and its tokenizer."""

    def __init__(self, network: Any, tokenizer: Tokenizer) -> None:
        super().__init__(network)
        self.tokenizer = tokenizer

    def forward(self, **inputs_BL: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, C) of token ids and masks by the names that `TextTransform` gives them."""
        logits_BC: Tensor = self.network(**inputs_BL).logits
        return logits_BC


def build_text(spec: Spec, num_classes: int | None) -> TextClassifier:
    """The classifier of a folder with its weights; a folder that has none for the last layers gets fresh ones.

    Raises:
        SpecError: transformers is not installed, or the files are not there, or do not fit.
    """
    if unknown := [name for name in spec.options if name not in _OPTIONS]:
        raise SpecError(f"{spec.text}: expected no option but {', '.join(_OPTIONS)}, found {unknown[0]!r}")
    config, tokenizer = _read_config(spec), _read_tokenizer(spec)
    transformers = import_transformers(spec)
    asked = parse_count(spec, "num_classes")
    if asked is not None and num_classes not in (None, asked):
        raise SpecError(f"{spec.text}: num_classes={asked}, but {num_classes} classes are needed here")
    wanted, has_head = num_classes if asked is None else asked, _has_head(config)
    refuse_wrong_files(spec)
    where = {"local_files_only": True, "trust_remote_code": False}
    try:
        described = transformers.AutoConfig.from_pretrained(spec.name, **where)
        if wanted is not None and wanted != described.num_labels:
            if has_head:
                raise SpecError(f"{spec.text}: has {described.num_labels} classes, but {wanted} are needed here")
            described.num_labels = wanted
        described.num_hidden_layers = _layers(spec, described.num_hidden_layers)
        level = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # of layers that are left out, or fresh: as asked
        try:
            network, info = getattr(transformers, _AUTO).from_pretrained(
                spec.name, config=described, use_safetensors=True, output_loading_info=True, **where
            )
        finally:
            transformers.utils.logging.set_verbosity(level)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise SpecError(f"{spec.text}: {describe_error(error)}; {_EXPECTED}") from error
    inner = f"{network.base_model_prefix}."
    fresh = [] if has_head else [name for name in info["missing_keys"] if not _is_of_encoder(name, inner)]
    if missing := sorted(set(info["missing_keys"]) - set(fresh)):
        raise SpecError(
            f"{spec.text}: expected the weights of a classifier of texts, but {len(missing)} of its tensors are "
            f"missing ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
    return TextClassifier(network.float(), tokenizer)


def _is_of_encoder(name: str, inner: str) -> bool:
    # What pools the tokens of an encoder is part of what is fresh where the file lacks it.
    return name.startswith(inner) and "pooler" not in name


def text_from_config(spec: Spec, config: Mapping[str, Any], num_classes: int | None) -> TextClassifier:
    """The architecture that a config describes, with random weights, and the tokenizer of the folder."""
    tokenizer = _read_tokenizer(spec)
    return TextClassifier(network_of_config(spec, config, num_classes, _AUTO), tokenizer)


def _read_config(spec: Spec) -> dict[str, Any]:
    return read_object(Path(spec.name) / "config.json", f"{spec.text}: {_EXPECTED}")


def refuse_headless(spec: Spec) -> None:
    """Raises SpecError for a folder that is no trained classifier, which would label with random numbers."""
    if not _has_head(_read_config(spec)):
        raise SpecError(
            f"{spec.text}: expected a trained classifier, found an encoder without the weights of a last layer; train "
            "it first ('softlabel train --student'), and give run:FOLDER"
        )
    if "layers" in spec.options:
        raise SpecError(f"{spec.text}: layers= makes the start of a student, whose last layer has not learnt yet")


def text_transform(spec: Spec) -> TextTransform:
    """The tokenizer of the folder, with the length that its files or the SPEC give.

    Raises:
        SpecError: the files are not there, or a length that the network does not take.
    """
    config, tokenizer = _read_config(spec), _read_tokenizer(spec)
    most = config.get("max_position_embeddings") or config.get("n_positions")
    pad_id = config.get("pad_token_id") or 0
    if most is not None and config.get("model_type") in _SHIFTED:
        most -= pad_id + 1
    length = parse_count(spec, "max_length")
    if length is not None and most is not None and length > most:
        raise SpecError(f"{spec.text}: max_length: expected at most {most}, which its positions allow, found {length}")
    told = read_object(Path(spec.name) / "tokenizer_config.json")
    if length is None:
        declared = told.get("model_max_length")
        length = int(min(one for one in (most, declared, _LONGEST) if isinstance(one, int | float)))
    try:
        return TextTransform(
            fingerprint=tokenizer.fingerprint,
            max_length=length,
            pad_id=int(pad_id),
            segments=int(config.get("type_vocab_size") or 0) > 1 and _gives_segments(told),
            lengths=parse_buckets(spec),
            # As transformers chooses it.
            truncation_side=str(told.get("truncation_side") or tokenizer.truncation_side),
            tokenizer=tokenizer,
        )
    except SpecError as error:
        raise SpecError(f"{spec.text}: {error}") from error


def transform_of_run(spec: Spec, recorded: TextTransform) -> TextTransform:
    """What a student was trained with, and the tokenizer of its run folder.

    Raises:
        SpecError: the tokenizer is not there, or another one.
    """
    tokenizer = _read_tokenizer(spec)
    if tokenizer.fingerprint != recorded.fingerprint:
        raise SpecError(
            f"{spec.name}/{TOKENIZER}: expected sha256 {recorded.fingerprint[:12]}..., with which the run was trained, "
            f"found {tokenizer.fingerprint[:12]}...; put the run's own back"
        )
    return replace(recorded, tokenizer=tokenizer)


def _gives_segments(told: Mapping[str, Any]) -> bool:
    """Whether transformers gives a network the segments of this tokenizer's tokens."""
    if "model_input_names" in told:
        return "token_type_ids" in told["model_input_names"]
    return told.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _has_head(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def _layers(spec: Spec, there: int) -> int:
    layers = parse_count(spec, "layers")
    if layers is not None and layers > there:
        raise SpecError(f"{spec.text}: layers: expected at most {there}, which the network has, found {layers}")
    return there if layers is None else layers


def _read_tokenizer(spec: Spec) -> Tokenizer:
    path = Path(spec.name) / TOKENIZER
    try:
        return Tokenizer(path.read_bytes())
    except OSError as error:
        raise SpecError(
            f"{spec.text}: {path}: cannot be read ({error.strerror}); save the tokenizer there, as save_pretrained of "
            "a fast tokenizer does"
        ) from error
