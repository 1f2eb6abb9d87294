"""Connect a language model that an engine runs to the encoding of its run."""

from collections.abc import Mapping, Sequence
from functools import cache

from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.labels.encodings.base import to_ids
from softlabel.labels.prompt_logprobs import convert_prompt_logprobs
from softlabel.models.from_vllm import PromptEngine, VllmEngine, VllmLanguageModel
from softlabel.models.teacher import Teacher
from softlabel.store.encodings import TopK
from softlabel.store.manifest import Run


def connect_engines(teachers: Sequence[Teacher], run: Run) -> None:
    """Let an engine answer, where a teacher has one: it starts with the first document.

    Raises:
        UsageError: the run asks for what an engine's log-probabilities do not say.
    """
    for teacher in teachers:
        if isinstance(teacher.model, VllmLanguageModel):
            kept = _check_run(teacher, len(teachers), run)
            _connect(teacher, teacher.model, kept, run)


def unpack_answers(packed_PW: Tensor, num_classes: int) -> dict[str, Tensor]:
    """The columns of `TopK`, as `convert_prompt_logprobs` made them, in what the model gives as hidden states."""
    index_PK, value_PK, tail_P1 = VllmLanguageModel.split(packed_PW)
    return {"index": to_ids(index_PK, num_classes), "value": value_PK.half(), "tail": tail_P1}


def _check_run(teacher: Teacher, teachers: int, run: Run) -> int:
    """How many tokens of a position are kept."""
    subject, encoding = f"teacher {teacher.spec.text}", run.encoding
    if not isinstance(encoding, TopK):
        raise UsageError(
            f"{subject}: knows the most probable tokens alone, expected encoding topk, found {encoding.name}; give "
            "--encoding topk, or a teacher lm:"
        )
    if (run.temperature, encoding.temperatures) != (1.0, (1.0,)):
        found = ", ".join(f"{one:g}" for one in sorted({run.temperature, *encoding.temperatures}))
        raise UsageError(
            f"{subject}: gives log-probabilities at temperature 1 alone, found {found}; give --temperature 1, or a "
            "teacher lm:"
        )
    if teachers > 1:
        raise UsageError(f"{subject}: expected it alone, found {teachers} teachers; label with each by itself")
    if run.members[0].calibration != 1.0:
        raise UsageError(f"{subject}: cannot be calibrated at temperature 1; leave --calibration out")
    return encoding.kept(run.num_classes)


def _connect(teacher: Teacher, model: VllmLanguageModel, kept: int, run: Run) -> None:
    tokens = run.tokens
    assert tokens is not None

    @cache
    def start() -> PromptEngine:
        return VllmEngine(teacher.spec, kept=kept, max_length=tokens.max_length, precision=teacher.precision)

    def ask(documents: Sequence[list[int]]) -> list[Mapping[str, NDArray]]:  # type: ignore[type-arg]
        recorded = start().record(documents)
        return [
            convert_prompt_logprobs(one, ids, k=kept, num_classes=run.num_classes)
            for one, ids in zip(recorded, documents, strict=True)
        ]

    model.ask, model.kept = ask, kept
