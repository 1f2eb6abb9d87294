"""``vllm:FOLDER``: a causal language model that vLLM runs, as a teacher.

vLLM gives the most probable tokens of a position with their log-probabilities, not its hidden states or all logits, and
nothing after a document's last token. What stands for the hidden state of a position here is its answer: the K tokens,
their logits less the largest one, and the logarithm of what all other tokens weigh, less the same. Its logits spread
the others' weight evenly.

Legend: B batch, L positions, P some positions, K kept tokens, V tokens of the vocabulary.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabel.common.spec import ENGINE_PLACES, Spec, literal
from softlabel.errors import SpecError, UsageError
from softlabel.inputs.json_object import read_object
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from softlabel.models.language_model import LanguageModel, refuse_size
from softlabel.models.lm_config import find_longest
from softlabel.models.options import parse_count
from softlabel.models.precision import PRECISIONS, Precision
from softlabel.models.program import file_sha256

_KNOWN = ("max_length", "buckets", *ENGINE_PLACES)
_EXPECTED = "expected a folder with config.json, safetensors and tokenizer.json, as save_pretrained writes them"

# The `prompt_logprobs` of a document: one entry for each of its tokens.
Recorded = Sequence[Mapping[Any, Any] | None]
# The documents' ids -> for each the columns `index`, `value` (L - 1, K) and `tail` (L - 1, 1).
Ask = Callable[[Sequence[list[int]]], Sequence[Mapping[str, NDArray[Any]]]]


class PromptEngine(Protocol):
    """What records log-probabilities of prompts."""

    def record(self, prompts: Sequence[list[int]]) -> Sequence[Recorded]:
        """The `prompt_logprobs` of each prompt, at temperature 1, with at least as many tokens as were asked for."""


class VllmEngine:
    """vLLM's `LLM`, with what its log-probabilities need: no prefix caching, and as many tokens as are kept.

    Args:
        spec: of the teacher.
        kept: tokens of a position.
        max_length: tokens of a document.
        precision: of the weights.
    """

    def __init__(self, spec: Spec, *, kept: int, max_length: int, precision: Precision) -> None:
        vllm = _import_vllm(spec)
        self._engine = vllm.LLM(
            model=spec.name,
            dtype=str(PRECISIONS[precision]).removeprefix("torch."),
            max_model_len=max_length + 1,  # a token has to be generated, which is thrown away
            enable_prefix_caching=False,  # tokens in the cache have no log-probabilities
            max_logprobs=kept,
            logprobs_mode="raw_logprobs",
            **{name: literal(spec.options[name]) for name in ENGINE_PLACES if name in spec.options},
        )
        self._asked = vllm.SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=kept, detokenize=False)

    def record(self, prompts: Sequence[list[int]]) -> Sequence[Recorded]:
        """See `PromptEngine`."""
        given = [{"prompt_token_ids": ids} for ids in prompts]
        return [one.prompt_logprobs for one in self._engine.generate(given, self._asked, use_tqdm=False)]


class VllmLanguageModel(LanguageModel):
    """A language model of which an engine has the weights.

    Attributes:
        sha256: of the files with the weights.
        ask: what answers documents; None until a run has said how many tokens it keeps.
        kept: so many.
    """

    def __init__(self, spec: Spec, vocabulary: Vocabulary, *, longest: int | None, sha256: str) -> None:
        super().__init__(nn.Module(), vocabulary)
        self.spec, self.sha256 = spec, sha256
        self.ask: Ask | None = None
        self.kept = 0
        self._longest = longest

    def __deepcopy__(self, memo: object) -> "VllmLanguageModel":
        raise TypeError("an engine cannot be copied")  # a run has one lane then

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The answers float32 (B, L, 2K + 1): ids, values and tail; at a last position what says nothing.

        Raises:
            UsageError: something else than labelling is asked for.
            DataError: the engine's answers are not those of the documents.
        """
        if self.ask is None or position_ids is not None or attention_mask is None:
            raise UsageError(f"{self.spec.text}: labels with 'softlabel generate' alone; give lm:{self.spec.name} here")
        ids_BL, lengths_B = input_ids.tolist(), attention_mask.sum(dim=1).tolist()
        documents = [tuple(ids[:length]) for ids, length in zip(ids_BL, lengths_B, strict=True)]
        # Filler repeats documents; those of one token have no position with an answer.
        asked = [list(ids) for ids in dict.fromkeys(documents) if len(ids) > 1]
        answers = dict(zip(map(tuple, asked), self.ask(asked) if asked else (), strict=True))
        kept = self.kept
        packed_BLW = np.zeros((*input_ids.shape, 2 * kept + 1), np.float32)
        packed_BLW[..., :kept] = np.arange(kept)
        size = self.vocabulary.size
        packed_BLW[..., -1] = math.log(size - kept) if size > kept else -math.inf
        for row, ids in enumerate(documents):
            if ids in answers:
                parts = [answers[ids][name].astype(np.float32) for name in ("index", "value", "tail")]
                packed_BLW[row, : len(ids) - 1] = np.concatenate(parts, axis=1)
        return torch.from_numpy(packed_BLW).to(input_ids.device)

    @staticmethod
    def split(hidden_PD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int64 (P, K), values (P, K) and tail (P, 1) of what `hidden` gives."""
        kept = hidden_PD.shape[-1] // 2
        return hidden_PD[..., :kept].long(), hidden_PD[..., kept : 2 * kept], hidden_PD[..., -1:]

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits (P, V): those of the kept tokens less the largest one, and of all others their mean weight."""
        index_PK, value_PK, tail_P1 = self.split(hidden_PD.float())
        size = self.vocabulary.size
        even_P1 = tail_P1 - math.log(max(1, size - index_PK.shape[-1]))
        return even_P1.repeat(*[1] * (hidden_PD.dim() - 1), size).scatter_(-1, index_PK, value_PK)

    @property
    def last_layer(self) -> None:
        """None: the engine does not give what goes into it."""
        return

    @property
    def longest(self) -> int | None:
        """See `LanguageModel.longest`."""
        return self._longest

    @property
    def title(self) -> str:
        """The engine."""
        return "vLLM"


def build_vllm(spec: Spec, num_classes: int | None) -> VllmLanguageModel:
    """The language model of a folder; its engine starts with the first document.

    Raises:
        SpecError: vLLM is not installed, the files are not there, or an option is not one of its own.
    """
    if unknown := [name for name in spec.options if name not in _KNOWN]:
        raise SpecError(f"{spec.text}: expected no option but {', '.join(_KNOWN)}, found {unknown[0]!r}")
    parse_count(spec, "tensor_parallel_size")
    share = literal(spec.options.get("gpu_memory_utilization", "0.9"))
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise SpecError(f"{spec.text}: gpu_memory_utilization: expected a number up to 1, found {share!r}")
    config = read_object(Path(spec.name) / "config.json", f"{spec.text}: {_EXPECTED}")
    vocabulary = read_vocabulary(spec.name)
    refuse_size(spec, vocabulary.size, num_classes)
    if not (weights := sorted(Path(spec.name).glob("*.safetensors"))):
        raise SpecError(f"{spec.text}: {_EXPECTED}; found no safetensors")
    if importlib.util.find_spec("vllm") is None:
        raise SpecError(f"{spec.text}: needs vLLM, which is not installed; pip install 'softlabel[vllm]', or give lm:")
    return VllmLanguageModel(spec, vocabulary, longest=find_longest(None, config), sha256=file_sha256(*weights))


def _import_vllm(spec: Spec) -> Any:
    try:
        import vllm
    except ImportError as error:
        raise SpecError(f"{spec.text}: cannot import vLLM ({error}); pip install 'softlabel[vllm]'") from error
    return vllm
