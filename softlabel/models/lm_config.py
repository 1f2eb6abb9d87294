"""Sizes of a language model: those of its config.json, and what the options of a SPEC put in their place."""

from collections.abc import Mapping
from typing import Any

from softlabel.common.spec import Spec, literal
from softlabel.errors import SpecError
from softlabel.models.from_hf import describe_error, import_transformers
from softlabel.models.options import parse_count

_OPTIONS = ("init", "seed", "layers", "max_length", "buckets")
# Short words for what every architecture's config has under a name of its own.
_SIZES = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads"}


def asks_random(spec: Spec) -> bool:
    asked = spec.options.get("init")
    if asked not in (None, "random"):
        raise SpecError(
            f"{spec.text}: init: expected random, or nothing for the weights of the folder, found {asked!r}"
        )
    return asked == "random"


def refuse_sizes(spec: Spec) -> None:
    known = [name for name in _OPTIONS if name != "seed"]
    if unknown := [name for name in spec.options if name not in known]:
        raise SpecError(
            f"{spec.text}: expected no option but {', '.join(known)}, found {unknown[0]!r}; seed= and sizes go with "
            "init=random"
        )


def resize(spec: Spec, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what the SPEC says otherwise: `layers`, `hidden`, `heads`, or any field that it has."""
    transformers = import_transformers(spec)
    try:
        fields: dict[str, Any] = transformers.AutoConfig.for_model(**config).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise SpecError(f"{spec.text}: config.json: {describe_error(error)}") from error
    for name, text in spec.options.items():
        if name in _SIZES:
            fields = set_size(spec, fields, name, parse_count(spec, name))
        elif name not in _OPTIONS:
            fields = set_size(spec, fields, name, literal(text))
    return fields


def set_size(spec: Spec, fields: Mapping[str, Any], word: str, value: Any) -> dict[str, Any]:
    """A config's fields with another one, and those that follow from it."""
    transformers = import_transformers(spec)
    described = transformers.AutoConfig.for_model(**fields)
    name = _SIZES.get(word, word)
    if not hasattr(described, name) or name in ("model_type", "architectures"):
        raise SpecError(
            f"{spec.text}: {word}: expected a field of its config.json, which has none of this name; such are "
            f"{', '.join(sorted(one for one, value in fields.items() if isinstance(value, int | float))[:12])}, ..."
        )
    before = {one: getattr(described, one, None) for one in ("hidden_size", "num_attention_heads", "head_dim")}
    kv_heads = getattr(described, "num_key_value_heads", None)
    try:
        setattr(described, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise SpecError(f"{spec.text}: {word}: {describe_error(error)}") from error
    width, heads = getattr(described, "hidden_size", None), getattr(described, "num_attention_heads", None)
    if name == "num_hidden_layers" and isinstance(kinds := getattr(described, "layer_types", None), list):
        described.layer_types = (kinds * (1 + value // max(1, len(kinds))))[:value]
    if name in ("hidden_size", "num_attention_heads") and width and heads:
        if width % heads:
            raise SpecError(f"{spec.text}: expected a width that is a multiple of the heads, found {width} and {heads}")
        if before["head_dim"] and before["head_dim"] * before["num_attention_heads"] == before["hidden_size"]:
            described.head_dim = width // heads
    if name == "num_attention_heads" and kv_heads and heads % kv_heads:
        if kv_heads != before["num_attention_heads"]:
            raise SpecError(
                f"{spec.text}: heads: expected a multiple of the {kv_heads} key-value heads, found {heads}; give "
                "'&num_key_value_heads=' before it"
            )
        described.num_key_value_heads = heads
    found: dict[str, Any] = described.to_dict()
    return found


def find_longest(spec: Spec | None, config: Mapping[str, Any]) -> int | None:
    """How many positions a network takes by its config, or by its SPEC; None for any number."""
    asked = None if spec is None else parse_count(spec, "max_position_embeddings")
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found = (config.get(name) for name in names) if asked is None else iter([asked])
    return next((one for one in found if isinstance(one, int)), None)
