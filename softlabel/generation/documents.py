"""What a run of language models adds to any other run: the data become documents of the teachers' common vocabulary."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from softlabel.dataset import Source
from softlabel.dataset.tokenize import TokenizedSource, tokenize_source
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.generation.config import GenerateConfig
from softlabel.inputs.tokens import TOKENS, TokenTransform
from softlabel.models import LanguageModel
from softlabel.models.teacher import Teacher
from softlabel.store.manifest import Run
from softlabel.store.token_rows import TokenRun

_SHARD_POSITIONS, _SHARD_BYTES = 1 << 22, 1 << 31  # of a shard at most, where nothing is asked for


def has_language_models(teachers: Sequence[Teacher]) -> bool:
    """Whether the teachers label the positions of documents."""
    return any(teacher.preprocessing.kind == TOKENS.name for teacher in teachers)


def read_documents(
    source: Source, teachers: Sequence[Teacher], config: GenerateConfig
) -> tuple[TokenizedSource, list[Teacher]]:
    """Tokenise the data for the teachers, which all take the same documents then.

    Raises:
        MismatchError: the teachers have different vocabularies, or one is no language model.
        UsageError: documents longer than a teacher takes, or options that language models do not have.
        DataError, SpecError: as `tokenize_source`.
    """
    _refuse_options(config)
    models: list[LanguageModel] = []
    for teacher in teachers:
        if not isinstance(teacher.model, LanguageModel):
            raise MismatchError(
                f"teachers: {teacher.spec.text} is no language model, {teachers[0].spec.text} is one; give teachers of "
                "one kind"
            )
        models.append(teacher.model)
    first = models[0].vocabulary
    for teacher, model in zip(teachers, models, strict=True):
        if (difference := first.find_difference(model.vocabulary)) is not None:
            raise MismatchError(
                f"teachers: {teachers[0].spec.text} and {teacher.spec.text} have different vocabularies: {difference}; "
                "label with each by itself"
            )
    transforms = [one.preprocessing for one in teachers if isinstance(one.preprocessing, TokenTransform)]
    length = config.max_length or min(one.max_length for one in transforms)
    for teacher, model in zip(teachers, models, strict=True):
        most = model.longest
        if most is not None and length > most:
            raise UsageError(
                f"max_length: expected at most {most}, which the positions of {teacher.spec.text} allow, found {length}"
            )
    lengths = transforms[0].lengths if length == transforms[0].max_length else ()
    shared = replace(transforms[0], max_length=length, lengths=lengths)
    documents = tokenize_source(source, first, max_length=length)
    if not count_positions(documents, config.positions):
        raise DataError(
            f"{source.name}: expected positions to label, found none in {len(documents):,} documents"
            + ("; check mask=, or what the chat template marks as answers" if config.positions == "masked" else "")
        )
    return documents, [replace(teacher, preprocessing=shared) for teacher in teachers]


def describe_documents(source: TokenizedSource, config: GenerateConfig) -> TokenRun:
    """How documents were made and which of their positions are labelled, for the store."""
    made = source.tokenization
    return TokenRun(
        tokenizer=made.vocabulary,
        max_length=made.max_length,
        template=made.template,
        bos=made.bos,
        eos=made.eos,
        positions=config.positions,
    )


def choose_shard_rows(source: TokenizedSource, config: GenerateConfig, run: Run, there: Run | None) -> int:
    """How many documents a shard has: those that fill its positions on average. A store keeps its number as it grows.

    A number of documents rather than of positions: the plan of shards then follows from the run alone.

    Args:
        run: with its columns.
        there: of the store that is continued.
    """
    if config.shard_positions is None and there is not None:
        return there.shard_rows
    row_bytes = sum(column.row_bytes for column in run.label_columns)
    wanted = config.shard_positions or min(_SHARD_POSITIONS, max(1, _SHARD_BYTES // row_bytes))
    documents = wanted * len(source) / max(1, count_positions(source, config.positions))
    return max(1, min(config.shard_rows, round(documents)))


def count_positions(source: TokenizedSource, positions: str, *, last: bool = True) -> int:
    """How many positions of all documents are labelled; without the `last` one of each where no teacher answers."""
    if positions == "masked":
        return int(source.counted.sum(dtype=np.int64))  # what counts is before another token
    return int(source.lengths.sum(dtype=np.int64)) - (0 if last else int((source.lengths > 0).sum()))


def refuse_token_options(config: GenerateConfig) -> None:
    """Raise UsageError for options of language models where there are none."""
    for name in ("max_length", "shard_positions"):
        if getattr(config, name) is not None:
            raise UsageError(f"{name}: is for language models, found none; leave it out, or give lm:FOLDER")
    if config.positions != "all":
        raise UsageError("positions: is for language models, found none; leave it out, or give lm:FOLDER")


def _refuse_options(config: GenerateConfig) -> None:
    if config.batch_size == "auto":
        raise UsageError("batch_size: auto is for samples of one size; give a number, or leave it out")
    if config.members_in_turn == "yes":
        raise UsageError("members_in_turn: language models stay on the device; leave it out")
    if config.activation != "softmax":
        raise UsageError(f"activation: a language model's outputs are a softmax, found {config.activation!r}")
