"""``lm:FOLDER``: causal language models of Hugging Face transformers, each with the vocabulary of its folder.

The last layer is applied apart from the network, so that (B, L, V) never exists: `head_weight`, `head_bias`,
`logit_scale` and `softcap` are all of it, which a probe checks while the network is built. Rows of the last layer that
no token of the vocabulary has are cut off.

Attention is PyTorch's (sdpa), which transformers takes by itself for every architecture that can have it. Nothing is
downloaded, no code of a folder is run, and weights are read from safetensors alone.

Legend: B batch, D width, L positions, P some positions, V tokens.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from softlabel.common.spec import Spec
from softlabel.errors import SpecError
from softlabel.inputs.json_object import read_object
from softlabel.inputs.tokenizer import TOKENIZER
from softlabel.inputs.tokens import TokenTransform
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from softlabel.models.from_hf import config_of, describe_error, import_transformers, refuse_wrong_files
from softlabel.models.language_model import (
    LanguageModel,
    differ,
    make_probe,
    refuse_few_rows,
    refuse_not_finite,
    refuse_size,
)
from softlabel.models.lm_config import asks_random, find_longest, refuse_sizes, resize, set_size
from softlabel.models.options import parse_buckets, parse_count

_AUTO = "AutoModelForCausalLM"
# Tokens of a document where neither the SPEC nor the folder has a smaller number.
_LONGEST = 2048
_EXPECTED = "expected a folder with config.json, model.safetensors and tokenizer.json, as save_pretrained writes them"


class TransformersLanguageModel(LanguageModel):
    """A causal language model of transformers, cut into its body and its last layer."""

    def __init__(self, network: Any, vocabulary: Vocabulary) -> None:
        config = network.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        super().__init__(network, vocabulary, logit_scale=_find_scale(config), softcap=cap)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """See `LanguageModel.hidden`."""
        # Padding is on the right and no position sees a later one: without the mask attention skips half of its work.
        found: Tensor = self.network.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return found

    @property
    def last_layer(self) -> nn.Module:
        """See `LanguageModel.last_layer`."""
        found: nn.Module = self.network.get_output_embeddings()
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The architecture as JSON, from which `lm_from_config` builds it again."""
        return config_of(self.network)

    @property
    def longest(self) -> int | None:
        """See `LanguageModel.longest`."""
        return find_longest(None, self.config)

    @property
    def title(self) -> str:
        """The model type."""
        return f"model type {self.network.config.model_type!r}"

    def files(self) -> dict[str, bytes]:
        """Tokenizer and architecture, as transformers reads them."""
        fields = {**json.loads(self.network.config.to_json_string()), "architectures": [type(self.network).__name__]}
        content = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
        return {**super().files(), "config.json": content}


def build_lm(spec: Spec, num_classes: int | None) -> TransformersLanguageModel:
    """The language model of a folder with its weights, or with ``init=random`` drawn at random.

    Raises:
        SpecError: transformers is not installed, the files are not there or do not fit, or the network is not one whose
            logits are its last layer's answer to what came before.
    """
    config, vocabulary = _read_config(spec), read_vocabulary(spec.name)
    is_random = asks_random(spec)
    if not is_random:
        refuse_sizes(spec)
    refuse_wrong_files(spec)
    refuse_size(spec, vocabulary.size, num_classes)
    network = lm_of_config(spec, resize(spec, config)) if is_random else _load(spec)
    return take_apart(spec, network, vocabulary)


def lm_of_config(spec: Spec, config: Mapping[str, Any]) -> Any:
    """The network of transformers that a config describes, float32, drawn at random: by ``seed=`` where the SPEC has
    it."""
    transformers = import_transformers(spec)
    fields = {k: v for k, v in config.items() if k not in ("auto_map", "_name_or_path", "transformers_version")}
    seed = parse_count(spec, "seed", least=0)
    try:
        described = transformers.AutoConfig.for_model(**fields)
        with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            network = getattr(transformers, _AUTO).from_config(described, trust_remote_code=False, dtype=torch.float32)
    except (TypeError, ValueError, KeyError, ImportError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise _describe_failure(spec, error, str(config.get("model_type"))) from error
    return network


def lm_from_config(spec: Spec, config: Mapping[str, Any], num_classes: int | None) -> TransformersLanguageModel:
    """The language model of a run folder, with random weights; see `network_of_config`."""
    vocabulary = read_vocabulary(spec.name)
    if num_classes not in (None, vocabulary.size):
        raise SpecError(
            f"{spec.name}/{TOKENIZER}: expected the {num_classes} tokens that the run was trained with, found "
            f"{vocabulary.size}; put the run's own back"
        )
    return TransformersLanguageModel(lm_of_config(Spec(kind=spec.kind, name=spec.name), config).float(), vocabulary)


def _load(spec: Spec) -> Any:
    transformers = import_transformers(spec)
    where = {"local_files_only": True, "trust_remote_code": False}
    kind = "unknown"
    try:
        described = transformers.AutoConfig.from_pretrained(spec.name, **where)
        kind = described.model_type
        asked = parse_count(spec, "layers")
        if asked is not None and asked > described.num_hidden_layers:
            raise SpecError(
                f"{spec.text}: layers: expected at most {described.num_hidden_layers}, which the network has, found "
                f"{asked}"
            )
        fields = described.to_dict()
        if asked is not None:
            described = transformers.AutoConfig.for_model(**set_size(spec, fields, "layers", asked))
        level = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # of layers that are left out: as asked
        try:
            network, info = getattr(transformers, _AUTO).from_pretrained(
                spec.name,
                config=described,
                use_safetensors=True,
                output_loading_info=True,
                **where,
            )
        finally:
            transformers.utils.logging.set_verbosity(level)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        raise _describe_failure(spec, error, kind) from error
    if missing := sorted(info["missing_keys"]):
        raise SpecError(
            f"{spec.text}: expected the weights of a language model, but {len(missing)} of its tensors are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
    return network


def _describe_failure(spec: Spec, error: Exception, kind: str) -> SpecError:
    if "Unrecognized configuration class" in str(error):  # followed by a list of all others
        return SpecError(f"{spec.text}: expected a causal language model, found a network of model type {kind!r}")
    return SpecError(f"{spec.text}: {describe_error(error)}; {_EXPECTED}")


def take_apart(spec: Spec, network: Any, vocabulary: Vocabulary) -> TransformersLanguageModel:
    """A network of transformers as its body and its last layer, in float32.

    Raises:
        SpecError: the parts are not the whole: another way to the logits, or one that sees later tokens.
    """
    model = TransformersLanguageModel(network.float(), vocabulary)
    size = vocabulary.size
    remedy = f"give the tokenizer that the network was trained with, or with init=random '&vocab_size={size}'"
    refuse_few_rows(spec, len(model.last_layer.weight), size, remedy)  # type: ignore[arg-type]
    length = min(6, find_longest(spec, model.config) or 6)
    ids_BL = make_probe(length, size)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden_BLD = model.hidden(ids_BL, torch.ones_like(ids_BL))
            ours_BLV = model.logits(hidden_BLD)
            theirs_BLV = model.network(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits[..., :size]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise SpecError(
            f"{spec.text}: expected a network of a body and a last layer, found that {model.title} fails on a probe: "
            f"{describe_error(error)}"
        ) from error
    finally:
        model.train(was_training)
    refuse_not_finite(spec, theirs_BLV, model.title)
    if (off := differ(ours_BLV, theirs_BLV)) is not None:
        raise SpecError(
            f"{spec.text}: expected logits that are the last layer's answer to what goes into it (times a scale, with "
            f"a cap), found those of {model.title} off by {off:.2g} on a probe"
        )
    if length > 1 and differ(ours_BLV[1, :-1], ours_BLV[0, :-1]) is not None:
        raise SpecError(
            f"{spec.text}: expected a causal language model, found that the answers of {model.title} depend on later "
            "tokens; set is_decoder to true in its config.json if it was trained as one"
        )
    return model


def _find_scale(config: Any) -> float:
    """What multiplies the last layer's answer, by the names that architectures have for it."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if isinstance(value := getattr(config, name, None), int | float):
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if not isinstance(scaling, int | float):
        return 1.0
    return float(scaling) if config.model_type.startswith("hyperclovax") else 1 / float(scaling)


def refuse_untrained(spec: Spec) -> None:
    """Raises SpecError for a language model that would label with random numbers."""
    if asks_random(spec):
        raise SpecError(f"{spec.text}: expected weights, found init=random: random weights label nothing")
    if "layers" in spec.options:
        raise SpecError(f"{spec.text}: layers= makes the start of a student, whose last layer has not learnt yet")


def _read_config(spec: Spec) -> dict[str, Any]:
    return read_object(Path(spec.name) / "config.json", f"{spec.text}: {_EXPECTED}")


def lm_transform(spec: Spec) -> TokenTransform:
    """How the network of a folder takes documents, with the length that the SPEC or its files give.

    Raises:
        SpecError: the files are not there, or a length that the network does not take.
    """
    config, vocabulary = _read_config(spec), read_vocabulary(spec.name)
    most = find_longest(spec, config)
    declared = read_object(Path(spec.name) / "tokenizer_config.json").get("model_max_length")
    return make_token_transform(
        spec, vocabulary, longest=most, declared=declared, pad_id=_find_padding(config, vocabulary.size)
    )


def make_token_transform(
    spec: Spec, vocabulary: Vocabulary, *, longest: int | None, declared: Any = None, pad_id: int = 0
) -> TokenTransform:
    """How a network takes documents: as the options of its SPEC say, or else as long as it takes them.

    Args:
        spec: the network's.
        vocabulary: its tokens.
        longest: how many positions it takes; None: any number.
        declared: the length that its tokenizer was saved with, where that is a number.
        pad_id: what stands behind the end of a document.
    """
    length = parse_count(spec, "max_length")
    if length is not None and longest is not None and length > longest:
        raise SpecError(
            f"{spec.text}: max_length: expected at most {longest}, which its positions allow, found {length}"
        )
    if length is None:
        length = int(min(one for one in (longest, declared, _LONGEST) if isinstance(one, int | float)))
    try:
        return TokenTransform(
            fingerprint=vocabulary.fingerprint,
            vocabulary=vocabulary.size,
            max_length=length,
            pad_id=pad_id,
            lengths=parse_buckets(spec),
        )
    except SpecError as error:
        raise SpecError(f"{spec.text}: {error}") from error


def _find_padding(config: Mapping[str, Any], size: int) -> int:
    found = config.get("pad_token_id")
    return found if isinstance(found, int) and 0 <= found < size else 0


def check_vocabulary(spec: Spec, recorded: TokenTransform) -> None:
    """Raises SpecError where the tokenizer in a run folder is not the one that the run was trained with."""
    found = read_vocabulary(spec.name).fingerprint
    if found != recorded.fingerprint:
        raise SpecError(
            f"{spec.name}/{TOKENIZER}: expected a vocabulary of fingerprint {recorded.fingerprint[:12]}..., with which "
            f"the run was trained, found {found[:12]}...; put the run's own back"
        )
