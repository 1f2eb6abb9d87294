"""``lm:python:module:function`` and ``lm:python:file.py:function``: language models that code of the user's makes.

    function(**options) -> torch.nn.Module         the SPEC's options, and the `vocab_size` V if it takes that name
    module(input_ids, attention_mask=..., position_ids=...)        those of the two that its `forward` takes

Of several documents in one line, the mask is given to a `forward` that cannot do without it, and is 1 everywhere; of
documents that have a line of their own, the positions, which count from 0.

What the module gives is one of

- logits (B, L, V) of all positions: a tensor, the first of a tuple, or `logits` of an object or mapping;
- `last_hidden_state` (B, L, D) of an object or mapping, where the module's `lm_head` is the last layer: a linear one.
  Logits are then what it answers, times `logit_scale`, with the cap `softcap`, where the module has these attributes;
- a causal language model of transformers is taken apart as one of a folder is.

V may be padded. The module's `max_length`, where it has one, is how many positions it takes.

Legend: B batch, D width, L positions, V tokens.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softlabel.common.spec import Spec
from softlabel.errors import SpecError
from softlabel.inputs.tokens import TokenTransform
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from softlabel.models.from_hf import describe_error
from softlabel.models.from_lm import make_token_transform, take_apart
from softlabel.models.language_model import (
    LanguageModel,
    differ,
    make_probe,
    refuse_few_rows,
    refuse_not_finite,
    refuse_size,
)

# What is not the function's: which tokenizer, and how long documents are.
OWN_OPTIONS = ("tokenizer", "max_length", "buckets")
_TRANSFORMERS = "transformers.modeling_utils.PreTrainedModel"
_EXPECTED = (
    "expected logits (B, L, V) of all positions, or last_hidden_state (B, L, D) of a module whose lm_head is a linear "
    "layer"
)


class PythonLanguageModel(LanguageModel):
    """A module whose answers are logits, or what goes into its `lm_head`."""

    def __init__(self, network: nn.Module, vocabulary: Vocabulary, *, has_layer: bool) -> None:
        settings = {"logit_scale": float(getattr(network, "logit_scale", 1.0)), "softcap": _find_cap(network)}
        super().__init__(network, vocabulary, **(settings if has_layer else {}))  # type: ignore[arg-type]
        self._has_layer = has_layer
        self._taken = _find_taken(network)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """See `LanguageModel.hidden`."""
        options = _choose_arguments(self._taken, input_ids, attention_mask, position_ids)
        found = _read_answer(self.network(input_ids, **options))
        answer = found.hidden if self._has_layer else found.logits
        assert answer is not None
        return answer if self._has_layer else answer[..., : self.vocabulary.size]

    @property
    def last_layer(self) -> nn.Module | None:
        """See `LanguageModel.last_layer`."""
        return self.network.lm_head if self._has_layer else None

    @property
    def longest(self) -> int | None:
        """See `LanguageModel.longest`."""
        found = getattr(self.network, "max_length", None)
        return found if isinstance(found, int) else None

    @property
    def title(self) -> str:
        """The class."""
        return type(self.network).__name__


def find_vocabulary(spec: Spec, given: Vocabulary | None) -> Vocabulary:
    """The vocabulary of the folder that ``tokenizer=`` names, or else the one that is there.

    Args:
        spec: the network's.
        given: of the labels, or of the run; None: there is none.

    Raises:
        SpecError: there is neither, or it cannot be read.
    """
    if "tokenizer" in spec.options:
        return read_vocabulary(spec.options["tokenizer"])
    if given is None:
        raise SpecError(
            f"{spec.text}: expected the tokenizer of the network, found none; give '?tokenizer=FOLDER', a folder with "
            "its tokenizer.json (a student takes that of its labels when they are given)"
        )
    return given


def wrap_module(spec: Spec, module: nn.Module, vocabulary: Vocabulary, num_classes: int | None) -> LanguageModel:
    """A module with its weights as a language model, in float32.

    Raises:
        SpecError: it does not answer as the head of this file says, or not for all tokens, or it sees later tokens.
    """
    size = vocabulary.size
    refuse_size(spec, size, num_classes)
    if any(f"{one.__module__}.{one.__name__}" == _TRANSFORMERS for one in type(module).__mro__):
        return take_apart(spec, module, vocabulary)
    module = module.float()
    longest = getattr(module, "max_length", None)
    ids_BL = make_probe(min(6, longest) if isinstance(longest, int) else 6, size)
    options = _choose_arguments(_find_taken(module), ids_BL, torch.ones_like(ids_BL), None)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            output = module(ids_BL, **options)
    except Exception as error:  # it is the user's code: whatever it raises is a fact about the SPEC
        raise SpecError(
            f"{spec.text}: expected a network that takes token ids (B, L), found that it fails on a probe: "
            f"{type(error).__name__}: {describe_error(error)}"
        ) from error
    finally:
        module.train(was_training)
    found = _read_answer(output)
    layer: Any = getattr(module, "lm_head", None)
    has_layer = found.hidden is not None and isinstance(layer, nn.Linear)
    answer = found.hidden if has_layer else found.logits
    if answer is None or answer.shape[:2] != ids_BL.shape or answer.dim() != 3 or not answer.is_floating_point():
        raise SpecError(f"{spec.text}: {_EXPECTED}, found {_describe(output)} for ids {tuple(ids_BL.shape)}")
    if has_layer and answer.shape[2] != layer.in_features:
        raise SpecError(
            f"{spec.text}: expected a last_hidden_state as wide as lm_head takes, {layer.in_features}, found "
            f"{answer.shape[2]}"
        )
    for name in ("logit_scale", "softcap"):
        if has_layer and isinstance(getattr(module, name, None), Tensor):
            raise SpecError(
                f"{spec.text}: {name}: expected a number, found a tensor, whose changes nothing would follow; answer "
                "with logits instead"
            )
    rows = layer.out_features if has_layer else answer.shape[2]
    refuse_few_rows(spec, rows, size, "give the tokenizer that the network was trained with, or a network of its size")
    if not has_layer:
        answer = answer[..., :size]  # the filler behind the vocabulary may be anything
    model = PythonLanguageModel(module, vocabulary, has_layer=has_layer)
    refuse_not_finite(spec, model.logits(answer), model.title)
    if ids_BL.shape[1] > 1 and differ(answer[1, :-1], answer[0, :-1]) is not None:
        raise SpecError(
            f"{spec.text}: expected a causal language model, found that the answers of {type(module).__name__} depend "
            "on later tokens; mask its attention"
        )
    return model


def python_lm_transform(spec: Spec, model: nn.Module | None) -> TokenTransform:
    """How the network takes documents.

    Raises:
        SpecError: its tokenizer or its length are not known, or a length that the network does not take.
    """
    if isinstance(model, LanguageModel):
        return make_token_transform(spec, model.vocabulary, longest=model.longest)
    return make_token_transform(spec, find_vocabulary(spec, None), longest=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a module gave: `logits` and `hidden`, each where it is there."""

    logits: Tensor | None
    hidden: Tensor | None


def _read_answer(output: Any) -> _Answer:
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        output = output[0] if output else None
    found: dict[str, Tensor | None] = {"logits": output if isinstance(output, Tensor) else None}
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            found[name] = value
    return _Answer(logits=found["logits"], hidden=found.get("last_hidden_state"))


def _describe(output: Any) -> str:
    found = _read_answer(output)
    answer = found.logits if found.hidden is None else found.hidden
    if answer is None:
        return type(output).__name__
    name = "last_hidden_state" if found.hidden is not None else "logits"
    return f"{name} {answer.dtype} {tuple(answer.shape)}"


def _find_taken(module: nn.Module) -> dict[str, bool]:
    """Which of the arguments beside the ids the module's `forward` takes, and whether it cannot do without."""
    parameters = inspect.signature(module.forward).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return {
        name: name in parameters and parameters[name].default is inspect.Parameter.empty
        for name in ("attention_mask", "position_ids")
        if takes_all or name in parameters
    }


def _choose_arguments(
    taken: Mapping[str, bool], input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> dict[str, Tensor]:
    """What the module gets beside the ids: what there is of what it takes, and what else it cannot do without."""
    if attention_mask is None and taken.get("attention_mask"):
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None and taken.get("position_ids"):
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    given = {"attention_mask": attention_mask, "position_ids": position_ids}
    return {name: value for name, value in given.items() if value is not None and name in taken}


def _find_cap(module: nn.Module) -> float | None:
    found = getattr(module, "softcap", None)
    return None if found is None else float(found)
