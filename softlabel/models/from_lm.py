"""``lm:FOLDER``: causal language models of Hugging Face transformers, each with the vocabulary of its folder.

    model = build_model("lm:FOLDER")                   a LanguageModel
    hidden_BLD = model.hidden(input_ids, attention_mask)
    logits_PV = model.logits(hidden_BLD[rows, positions])      in as many pieces as the memory wants

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
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from softlabel.common.spec import Spec
from softlabel.errors import SpecError
from softlabel.inputs.tokenizer import TOKENIZER
from softlabel.inputs.tokens import TokenTransform
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from softlabel.models.folder_json import read_json
from softlabel.models.from_hf import HuggingFaceClassifier, describe_error, import_transformers, refuse_wrong_files
from softlabel.models.lm_config import asks_random, find_longest, refuse_sizes, resize, set_size
from softlabel.models.options import parse_buckets, parse_count

_AUTO = "AutoModelForCausalLM"
# Tokens of a document where neither the SPEC nor the folder has a smaller number.
_LONGEST = 2048
_TOLERANCE = 1e-4
_EXPECTED = "expected a folder with config.json, model.safetensors and tokenizer.json, as save_pretrained writes them"


class LanguageModel(HuggingFaceClassifier):
    """A causal language model of transformers, cut into its body and its last layer.

    Attributes:
        vocabulary: its tokens; `vocabulary.size` is V.
        logit_scale: that the last layer's answer is multiplied with.
        softcap: c of c tanh(logits / c), after the scale; None for none.
    """

    def __init__(self, network: Any, vocabulary: Vocabulary) -> None:
        super().__init__(network)
        self.vocabulary = vocabulary
        config = network.config.get_text_config()
        self.logit_scale = _find_scale(config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """What goes into the last layer.

        Args:
            input_ids: int64 (B, L).
            attention_mask: int64 (B, L), 1 where there is a token; padding is on the right.
            position_ids: int64 (B, L), for several documents in a row instead of `attention_mask`: they count from 0 in
                each, and none sees another.

        Returns:
            (B, L, D).
        """
        found: Tensor = self.network.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return found

    @property
    def head_weight(self) -> Tensor:
        """(V, D), without the rows to which a last layer is padded."""
        return self._cut(self.network.get_output_embeddings().weight)

    @property
    def head_bias(self) -> Tensor | None:
        """(V,), or None."""
        bias: Tensor | None = self.network.get_output_embeddings().bias
        return None if bias is None else self._cut(bias)

    def _cut(self, rows: Tensor) -> Tensor:
        return rows if len(rows) == self.vocabulary.size else rows[: self.vocabulary.size]

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits (P, V) of the vocabulary's tokens, or (..., V) of (..., D)."""
        logits = F.linear(hidden_PD, self.head_weight, self.head_bias)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits (B, L, V) at all positions; `mask`, which `TokenTransform` gives as well, changes none of them."""
        return self.logits(self.hidden(input_ids, attention_mask))


def build_lm(spec: Spec, num_classes: int | None) -> LanguageModel:
    """The language model of a folder with its weights, or with ``init=random`` drawn at random.

    Raises:
        SpecError: transformers is not installed, the files are not there or do not fit, or the network is not one whose
            logits are its last layer's answer to what came before.
    """
    config, vocabulary = read_json(spec, "config.json", _EXPECTED), read_vocabulary(spec.name)
    is_random = asks_random(spec)
    if not is_random:
        refuse_sizes(spec)
    refuse_wrong_files(spec)
    if num_classes not in (None, vocabulary.size):
        raise SpecError(
            f"{spec.text}: has a vocabulary of {vocabulary.size} tokens, but {num_classes} are needed here; give a "
            "network with the tokenizer that the labels were made with"
        )
    network = lm_of_config(spec, resize(spec, config)) if is_random else _load(spec)
    return _check_parts(spec, LanguageModel(network.float(), vocabulary))


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


def lm_from_config(spec: Spec, config: Mapping[str, Any], num_classes: int | None) -> LanguageModel:
    """The language model of a run folder, with random weights; see `network_of_config`."""
    vocabulary = read_vocabulary(spec.name)
    if num_classes not in (None, vocabulary.size):
        raise SpecError(
            f"{spec.name}/{TOKENIZER}: expected the {num_classes} tokens that the run was trained with, found "
            f"{vocabulary.size}; put the run's own back"
        )
    return LanguageModel(lm_of_config(Spec(kind=spec.kind, name=spec.name), config).float(), vocabulary)


def describe_network(model: LanguageModel) -> bytes:
    """The network as transformers' config.json has it."""
    fields = {**json.loads(model.network.config.to_json_string()), "architectures": [type(model.network).__name__]}
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


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


def _check_parts(spec: Spec, model: LanguageModel) -> LanguageModel:
    """Raises SpecError where the parts are not the whole: another way to the logits, or one that sees later tokens."""
    rows, size = len(model.network.get_output_embeddings().weight), model.vocabulary.size
    if rows < size:
        raise SpecError(
            f"{spec.text}: expected a last layer of at least {size} rows, one for each token of {TOKENIZER}, found "
            f"{rows}; give the tokenizer that the network was trained with, or with init=random '&vocab_size={size}'"
        )
    length = min(6, find_longest(spec, model.config) or 6)
    first_L = torch.arange(length) * 7919 % size
    other_L = first_L.clone()
    other_L[-1] = (other_L[-1] + 1) % size
    ids_BL = torch.stack([first_L, other_L])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden_BLD = model.hidden(ids_BL, torch.ones_like(ids_BL))
            ours_BLV = model.logits(hidden_BLD)
            theirs_BLV = model.network(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits[..., :size]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise SpecError(
            f"{spec.text}: expected a network of a body and a last layer, found that model type "
            f"{model.network.config.model_type!r} fails on a probe: {describe_error(error)}"
        ) from error
    finally:
        model.train(was_training)
    scale = max(1.0, float(theirs_BLV.abs().max()))
    if (off := float((ours_BLV - theirs_BLV).abs().max())) > _TOLERANCE * scale:
        raise SpecError(
            f"{spec.text}: expected logits that are the last layer's answer to what goes into it (times a scale, with "
            f"a cap), found those of model type {model.network.config.model_type!r} off by {off:.2g} on a probe"
        )
    if length > 1 and float((ours_BLV[0, :-1] - ours_BLV[1, :-1]).abs().max()) > _TOLERANCE * scale:
        raise SpecError(
            f"{spec.text}: expected a causal language model, found that the answers of model type "
            f"{model.network.config.model_type!r} depend on later tokens; set is_decoder to true in its config.json if "
            "it was trained as one"
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


def lm_transform(spec: Spec) -> TokenTransform:
    """How the network of a folder takes documents, with the length that the SPEC or its files give.

    Raises:
        SpecError: the files are not there, or a length that the network does not take.
    """
    config, vocabulary = read_json(spec, "config.json", _EXPECTED), read_vocabulary(spec.name)
    most = find_longest(spec, config)
    length = parse_count(spec, "max_length")
    if length is not None and most is not None and length > most:
        raise SpecError(f"{spec.text}: max_length: expected at most {most}, which its positions allow, found {length}")
    if length is None:
        declared = read_json(spec, "tokenizer_config.json", None).get("model_max_length")
        length = int(min(one for one in (most, declared, _LONGEST) if isinstance(one, int | float)))
    try:
        return TokenTransform(
            fingerprint=vocabulary.fingerprint,
            vocabulary=vocabulary.size,
            max_length=length,
            pad_id=_find_padding(config, vocabulary.size),
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


def check_packing(spec: Spec, model: LanguageModel) -> None:
    """Raises SpecError where documents side by side in one row would see each other."""
    size = model.vocabulary.size
    ids_L = torch.arange(6, device=model.head_weight.device) * 7919 % size
    positions_BL = torch.tensor([[0, 1, 2, 0, 1, 2]], device=ids_L.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed_LD = model.hidden(ids_L[None], None, positions_BL)[0]
            alone = [model.hidden(part[None], torch.ones_like(part[None]))[0] for part in (ids_L[:3], ids_L[3:])]
    finally:
        model.train(was_training)
    far = float((packed_LD - torch.cat(alone)).abs().max())
    if far > _TOLERANCE * max(1.0, float(packed_LD.abs().max())):
        raise SpecError(
            f"{spec.text}: expected documents in one row to be apart, found that those of model type "
            f"{model.network.config.model_type!r} see each other (off by {far:.2g} on a probe); train without packing"
        )
