"""Documents as what language models learn from: every position that counts, packed or padded."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from softlabel.common.spec import parse_spec
from softlabel.dataset import Source, open_source, report_source, require_samples
from softlabel.dataset.tokenize import TokenizedSource
from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.language import TokenMeasurement, tokenize_for
from softlabel.inputs.tokenizer import Tokenizer
from softlabel.inputs.tokens import TokenTransform
from softlabel.inputs.vocabulary import Vocabulary
from softlabel.loader.token_batch import TokenBatch
from softlabel.loader.token_loader import TokenLoader
from softlabel.models import LanguageModel, build_model, check_packing, names_language_model
from softlabel.models.teacher import student_preprocessing
from softlabel.training.config import TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.grid import StudentConfig
from softlabel.training.step import Counts
from softlabel.training.student import Student
from softlabel.training.task import Loader, Task
from softlabel.training.token_step import TokenPart, TokenStep, cut_lines
from softlabel.training.token_student import TokenStudent

# Options that say nothing about a language model, and why.
_OF_IMAGES, _OF_VIEWS = "is of images", "is of views of images"
_OTHERS = {
    "augment": _OF_IMAGES,
    "crop_padding": _OF_IMAGES,
    "mixup": _OF_IMAGES,
    "view_order": _OF_VIEWS,
    "check_views": _OF_VIEWS,
    "cache": _OF_IMAGES,
    "cache_mb": "is of decoded images; documents are mapped from the file of their tokens",
    "streaming": "is of data that is read block by block; documents are mapped from the file of their tokens",
    "source_ratio": "mixes samples one by one; documents are packed together",
    "ignore_labels": "is of labels in the data; those of a language model are the next tokens: give --hard-weight 0",
    "sync_batchnorm": "is of batch norms, which language models do not have",
    "fix_labels": "compares samples with one label each",
    "confidence": "is of samples with one label each",
    "loss": "is of samples with one label each; a language model's logits exist for a part of the positions at a time, "
    "with the distillation loss",
    "difference_weight": "is of noisy images",
    "embedding_loss": "compares one embedding of each sample",
    "compile": "compiles a whole network; the last layer of a language model is fused with the loss instead",
}


def are_language_models(configs: Sequence[StudentConfig]) -> bool:
    """Whether the students of a pass are language models.

    Raises:
        UsageError: only some are.
    """
    found = [names_language_model(parse_spec(config.student)) for config in configs]
    if len(set(found)) > 1:
        one, other = configs[found.index(True)].student, configs[found.index(False)].student
        raise UsageError(
            f"student {one}: is a language model, and {other} is none; students of one pass share their inputs: train "
            "them apart"
        )
    return found[0]


class TokenTask(Task):
    """See `Task`."""

    unit = "tok"
    unusable = "documents that have no token, or had none when they were labelled"

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        config, first = self.config, self.configs[0]
        _check_options(config)
        assert config.line is not None
        assert config.batch_tokens is not None
        self._line, self._batch_tokens, self._packed = config.line, config.batch_tokens, config.pack is not None
        self._models = [self._build(one) for one in self.configs]
        model, transform = self._models[0]
        for one, (other, _) in zip(self.configs, self._models, strict=True):
            if difference := model.vocabulary.find_difference(other.vocabulary):
                raise MismatchError(
                    f"student {one.student}: expected the vocabulary of {first.student}, found another one: "
                    f"{difference}; train them apart"
                )
        stored = None if self.store is None else self.store.run.tokens
        self._max_length = min(transform.max_length, self._line) if stored is None else stored.max_length
        self.source = self._documents = self._tokenize(self.source)
        longest = int(self._documents.lengths.max(initial=0))
        for one, (_, own) in zip(self.configs, self._models, strict=True):
            if longest > own.max_length:
                raise MismatchError(
                    f"student {one.student}: takes documents of at most {own.max_length} tokens, the longest that was "
                    f"labelled has {longest}; give a network of more positions, or '?max_length={longest}' where it "
                    "has them"
                )
        self.num_classes = model.vocabulary.size

    def _build(self, config: StudentConfig) -> tuple[LanguageModel, TokenTransform]:
        torch.manual_seed(config.shared.seed)  # each by itself: what a student starts from does not depend on others
        tokenizer = None if self.store is None else self.store.tokenizer
        vocabulary = None if tokenizer is None else Vocabulary(Tokenizer(tokenizer))
        model = build_model(config.student, vocabulary=vocabulary)
        assert isinstance(model, LanguageModel)
        if self._packed:
            check_packing(parse_spec(config.student), model)
        transform = student_preprocessing(config.student, model, TokenTransform.kind)
        assert isinstance(transform, TokenTransform)
        return model, transform

    def _tokenize(self, source: Source) -> TokenizedSource:
        subject, model = f"student {self.configs[0].student}", self._models[0][0]
        found = tokenize_for(subject, source, model, self.store, max_length=self._max_length)
        if self.report:
            report_source(found)
        return found

    def _identify_samples(self) -> dict[str, Any]:
        return {"tokens": self._documents.checksum, "documents": asdict(self._documents.tokenization)}

    def _open(self, source: Any, ranks: Ranks, workers: int, **settings: Any) -> TokenLoader:
        return TokenLoader(
            source,
            pack=self.config.pack,
            pad=self.config.pad,
            workers=workers,
            pin_memory=ranks.device.type == "cuda",
            rank=ranks.rank,
            world_size=ranks.world_size,
            **settings,
        )

    def open_loader(self, ranks: Ranks, workers: int, views: int | None) -> TokenLoader:
        config = self.config
        return self._open(
            self.source,
            ranks,
            workers,
            labels=self.store,
            batch_tokens=self._batch_tokens,
            seed=config.seed,
            tail="drop",
            missing=config.missing,
            combine=self.combination,
        )

    @contextlib.contextmanager
    def open_eval_loader(self, data: Any, ranks: Ranks, workers: int) -> Iterator[TokenLoader | None]:
        chosen = self.config.eval_data if data is None else data
        if chosen is None:
            yield None
            return
        source = open_source(chosen)
        require_samples(source)
        loader = self._open(
            self._tokenize(source),
            ranks,
            workers,
            batch_tokens=2 * self._batch_tokens,
            shuffle=False,
            # Filler makes the shares of processes equal, and is not counted.
            tail="pad" if ranks.several else "keep",
        )
        with contextlib.closing(loader):
            yield loader

    def make_student(self, number: int, *, ranks: Ranks, temperature: float, steps: int) -> TokenStudent:
        config, (model, transform) = self.configs[number], self._models[number]
        return TokenStudent(
            config,
            model,
            # What the student has learnt from, which is what it can be asked.
            replace(transform, max_length=self._max_length, lengths=()),
            ranks=ranks,
            precision=self.precision,
            temperature=temperature if config.temperature is None else config.temperature,
            steps=steps,
            packed=self._packed,
        )

    def count_units(self, loader: Loader) -> int:
        assert isinstance(loader, TokenLoader)
        return int(loader.dataset.packing.lengths.sum())

    def describe_data(self, loader: Loader) -> list[str]:
        tokens, lines = self.count_units(loader), loader.num_samples
        how = "packed, " if self._packed else ""
        steps, most = len(loader), min(lines, self._batch_tokens // self._line)
        return [
            f"data {loader.source.name}: {len(loader.dataset):,} documents, {tokens:,} tokens in {lines:,} lines of "
            f"{self._line} ({how}{tokens / (lines * self._line):.0%} full), "
            f"{'1 step of' if steps == 1 else f'{steps} steps of at most'} {most} line{'s' * (most > 1)} an epoch"
        ]

    def cut(self, batch: TokenBatch) -> tuple[TokenBatch, tuple[tuple[TokenPart, Counts], ...]]:
        return batch, cut_lines(batch, self.config.accumulate)

    def prepare(
        self,
        batch: TokenBatch,
        parts: tuple[tuple[TokenPart, Counts], ...],
        whole: Counts,
        students: Sequence[Student],
        *,
        epoch: int,
        step: int,
    ) -> TokenStep:
        return TokenStep(epoch=epoch, step=step, parts=parts, whole=whole, batch=batch)

    def measure(self, student: Student, loader: Loader) -> TokenMeasurement:
        model = student.evaluated.eval()
        assert isinstance(model, LanguageModel)
        return TokenMeasurement(model, device=student.device, precision=student.precision, packed=self._packed)


def _check_options(config: TrainConfig) -> None:
    """Raise UsageError for an option that a language model does not have: none is ignored."""
    default = {field.name: field.default for field in fields(TrainConfig)}
    for name, why in _OTHERS.items():
        if (value := getattr(config, name)) != default[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{name}: {value} {why}; leave {flag} out for a language model")
    if "dot" in config.values("optimizer"):
        raise UsageError(
            "optimizer: dot needs the gradients of the soft and of the hard term apart, which a language model "
            "computes together; use adamw or sgd"
        )
    if config.combine == "random":
        raise UsageError(
            "combine: random takes one member for each sample and epoch; a language model takes logits or probs"
        )
    if config.line is None:
        raise UsageError(
            "pack and pad: expected one of them for a language model, the positions of a line, found neither; give "
            "--pack for several documents a line, or --pad for one"
        )
