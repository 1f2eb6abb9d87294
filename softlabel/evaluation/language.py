"""How good a language model is: what it says at every position that counts, against the next token and the teacher.

Logits exist for a chunk of positions at a time, in float64.

Legend: B lines, L positions of a line, P positions that count, R of a chunk, D width, V tokens of the vocabulary.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from softlabel.dataset import Source, report_source
from softlabel.dataset.tokenize import TokenizedSource, tokenize_source
from softlabel.errors import MismatchError
from softlabel.evaluation.metrics import BINS, Evaluation, Totals
from softlabel.evaluation.network import evaluating
from softlabel.inputs.base import IGNORE, InputTransform
from softlabel.inputs.chat import CHATS
from softlabel.inputs.text import TEXTS
from softlabel.inputs.tokenizer import Tokenizer
from softlabel.inputs.tokens import TokenTransform
from softlabel.inputs.vocabulary import Vocabulary
from softlabel.loader import Missing
from softlabel.loader.token_batch import TokenBatch
from softlabel.loader.token_loader import TokenLoader
from softlabel.loss import distillation_loss
from softlabel.loss.targets import Target, TopKTarget
from softlabel.models import LanguageModel, measure_leak
from softlabel.models.precision import Precision, computing
from softlabel.store.reader import Store

_CHUNK, _CHUNK_ON_DEVICE = 1 << 22, 1 << 25  # logits that exist at a time, in float64


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvaluation(Evaluation):
    """What was measured of a language model: `samples` are documents, what is labelled are positions whose next token
    counts, to which `accuracy`, `cross_entropy` (the NLL, in nats a token) and `calibration_error` refer; those with a
    teacher are the ones among them that the store has a label of.

    Attributes:
        tokens: of all documents.
        perplexity: exp(cross_entropy).
        teacher_kl_kind: exact where the store has every token's probability; bucketed where it has those of the most
            probable tokens: the others are then one outcome, and the divergence is at most the exact one.
    """

    tokens: int = 0
    perplexity: float | None = None
    teacher_kl_kind: Literal["exact", "bucketed"] | None = None

    @property
    def figures(self) -> tuple[tuple[str, float | None], ...]:
        """See `Evaluation`."""
        kind = "" if self.teacher_kl_kind in (None, "exact") else f" ({self.teacher_kl_kind})"
        return (
            ("NLL (nats a token)", self.cross_entropy),
            ("perplexity", self.perplexity),
            ("next-token accuracy", self.accuracy),
            (f"calibration error ({BINS} bins)", self.calibration_error),
            ("agreement with the teacher", self.agreement),
            (f"KL(teacher || model) at T = {self.temperature or 1:g}{kind}", self.teacher_kl),
            ("next-token accuracy of the teacher", self.teacher_accuracy),
        )

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """See `Evaluation`."""
        some = self.with_teacher not in (0, self.labelled)
        compared = (("compared with the teacher", self.with_teacher),) if some else ()
        return (("documents", self.samples), ("tokens", self.tokens), ("predicted", self.labelled), *compared)


class TokenTotals(Totals):
    """Sums over positions, float64."""

    NAMES = (*Totals.NAMES, "documents", "tokens", "bucketed")

    def add_positions(
        self, logits_RV: Tensor, labels_R: Tensor, target: Target | None, known_R: Tensor | None
    ) -> Tensor | None:
        """Take in positions that count.

        Args:
            logits_RV: float64.
            labels_R: the next tokens, -100 for none.
            target: of all of them, filler where it is not known.
            known_R: bool, which have a target; None: all.

        Returns:
            KL(teacher || model) of each, float64 (R,), NaN where it is not measured; None where targets do not say it.
        """
        counts_R = torch.ones_like(labels_R, dtype=torch.bool)
        predicted_R = labels_R != IGNORE  # the teacher is compared at the positions that all other figures are of
        known_R = predicted_R if known_R is None else predicted_R & known_R
        nats = self._add_rows(logits_RV, labels_R, counts_R, target, known_R)
        if nats is None:
            return None
        found_R = torch.full_like(labels_R, math.nan, dtype=torch.float64)
        found_R[known_R] = nats.double()
        return found_R

    def add_documents(self, batch: TokenBatch) -> None:
        """Count the documents of a batch."""
        self._sum(documents=len(batch.keys), tokens=(batch.segments > 0).sum())

    def _measure_divergence(self, logits_RV: Tensor, target: Target) -> Tensor | None:
        if not isinstance(target, TopKTarget):
            return super()._measure_divergence(logits_RV, target)
        if target.index.shape[1] < target.num_classes:
            self._sum(bucketed=len(logits_RV))
        t = target.temperature
        settings = {"temperature": t, "soft_weight": 1.0, "hard_weight": 0.0}
        return distillation_loss(logits_RV, target, reduction="none", **settings) / t**2  # type: ignore[arg-type]

    def result(self, reduce: Callable[[Tensor], Tensor] | None) -> TokenEvaluation:
        """See `Totals.result`."""
        figures, sums = self._summarize(reduce)
        nll = figures["cross_entropy"]
        kind: Literal["exact", "bucketed"] = "bucketed" if sums["bucketed"] else "exact"
        return TokenEvaluation(
            **{**figures, "samples": int(sums["documents"])},
            tokens=int(sums["tokens"]),
            perplexity=None if nll is None else (math.exp(nll) if nll < 700 else math.inf),
            teacher_kl_kind=None if figures["teacher_kl"] is None else kind,
        )


class TokenMeasurement:
    """What measures a language model batch by batch; see `softlabel.evaluation.evaluate.Measurement`.

    Args:
        model: on `device` and in eval mode.
        packed: whether a line may have several documents.
    """

    def __init__(self, model: LanguageModel, *, device: torch.device, precision: str, packed: bool) -> None:
        self._model, self._device, self._precision, self._packed = model, device, precision, packed
        self._totals = TokenTotals()

    @torch.inference_mode()
    def add(self, batch: TokenBatch) -> Tensor | None:
        """Take in a batch on the device.

        Returns:
            KL(teacher || model) of each position that counts, float64 (P,), NaN where it is not measured; None where
            targets do not say it.
        """
        self._totals.add_documents(batch)
        labels_P, target, has_target_P = batch.hard_labels, batch.target, batch.has_target
        parts = []
        with computing(self._precision, self._device):
            hidden_PD = compute_hidden(self._model, batch, packed=self._packed)
            values = _CHUNK if self._device.type == "cpu" else _CHUNK_ON_DEVICE
            step = max(1, values // self._model.vocabulary.size)
            for start in range(0, len(hidden_PD), step):
                rows = slice(start, start + step)
                nats_R = self._totals.add_positions(
                    self._model.logits(hidden_PD[rows]).double(),
                    labels_P[rows],
                    None if target is None else target.take(rows),
                    None if has_target_P is None else has_target_P[rows],
                )
                if nats_R is not None:
                    parts.append(nats_R)
        return torch.cat(parts) if parts else None

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> TokenEvaluation:
        """Of all batches so far."""
        return self._totals.result(reduce)


def compute_hidden(model: LanguageModel, batch: TokenBatch, *, packed: bool) -> Tensor:
    """What goes into the last layer at the positions that count, (P, D).

    Args:
        packed: whether a line may have several documents, which must not see each other: `position_ids` keep them
            apart. One alone has the mask of its tokens.
    """
    mask_BL, position_ids_BL = (None, batch.position_ids) if packed else ((batch.segments > 0).long(), None)
    return batch.at_places(model.hidden(batch.tokens, mask_BL, position_ids_BL))


def tokenize_for(
    subject: str, source: Source, model: LanguageModel, store: Store | None, *, max_length: int
) -> TokenizedSource:
    """The documents of a source for a language model, as those of a store were made.

    Args:
        subject: who asks, for messages, such as "student lm:FOLDER".
        source: of texts, chats or token ids.
        model: whose tokenizer is used.
        store: of labels; None: there are none.
        max_length: tokens of a document.

    Raises:
        MismatchError: the store is not of tokens, or its documents were made with another vocabulary, other tokens at
            their ends or another chat template.
        SpecError, DataError: see `tokenize_source`.
    """
    if store is not None:
        check_vocabulary(subject, store, model.vocabulary)
    found = tokenize_source(source, model.vocabulary, max_length=max_length)
    if store is not None:
        _check_tokenization(subject, store, found, model.vocabulary)
    return found


def check_vocabulary(subject: str, store: Store, vocabulary: Vocabulary) -> None:
    """Raise MismatchError, with the first id that differs, where a store of tokens has another vocabulary, or where
    labels are none of tokens.

    Args:
        subject: whose vocabulary it is, for messages, such as "student lm:FOLDER".
    """
    if store.run.tokens is None:
        raise MismatchError(
            f"{store.path}: has one label a sample, a language model learns from one a token; label the data with an "
            "lm: teacher"
        )
    if store.run.tokens.tokenizer == vocabulary.fingerprint:
        return
    content = store.tokenizer
    difference = None if content is None else Vocabulary(Tokenizer(content)).find_difference(vocabulary)
    where = "" if difference is None else f": {difference}"
    raise MismatchError(
        f"{subject}: expected the vocabulary of the labels {store.path}, found another one{where}; give a network with "
        "the tokenizer that the data was labelled with"
    )


def _check_tokenization(subject: str, store: Store, source: TokenizedSource, vocabulary: Vocabulary) -> None:
    """Raise where documents differ from those that were labelled by something that has a name; what else may differ
    shows in the content hashes."""
    stored, made = store.run.tokens, source.tokenization
    assert stored is not None

    def name(number: int | None) -> str:
        return "no token" if number is None else repr(vocabulary.tokens[number])

    if source.base.inputs == TEXTS:
        for where, there, here in (("beginning", stored.bos, made.bos), ("end", stored.eos, made.eos)):
            if there != here:
                raise MismatchError(
                    f"{subject}: expected {name(there)} at the {where} of a text, as when {store.path} was made, found "
                    f"that its tokenizer adds {name(here)}; give a network with the tokenizer of the labels"
                )
    if source.base.inputs == CHATS and stored.template != made.template:
        raise MismatchError(
            f"{subject}: expected the chat template that {store.path} was made with, found another one; give a network "
            "with the tokenizer of the labels"
        )


def evaluate_language_model(
    name: str,
    model: LanguageModel,
    source: Source,
    store: Store | None,
    *,
    transform: InputTransform | None,
    batch_tokens: int,
    precision: Precision,
    device: torch.device,
    workers: int,
    missing: Missing,
    progress: bool | None,
) -> TokenEvaluation:
    """Measure a language model on the documents of a source; see `softlabel.evaluate`.

    Args:
        name: of the model, for messages.
        transform: how long its documents are; None: as long as its positions allow, at most 2048.
    """
    max_length = choose_length(model, store, transform)
    documents = tokenize_for(f"model {name}", source, model, store, max_length=max_length)
    report_source(documents)
    return measure_on_documents(
        name,
        model,
        documents,
        store,
        batch_tokens=batch_tokens,
        precision=precision,
        device=device,
        workers=workers,
        missing=missing,
        progress=progress,
    )


def choose_length(model: LanguageModel, store: Store | None, transform: InputTransform | None) -> int:
    """How many tokens a document has: as in a store; else what the transform takes, or the model, at most 2048."""
    if store is not None and store.run.tokens is not None:
        return store.run.tokens.max_length
    if isinstance(transform, TokenTransform):
        return transform.max_length
    return min(model.longest or 2048, 2048)


def measure_on_documents(
    name: str,
    model: LanguageModel,
    documents: Source,
    store: Store | None,
    *,
    batch_tokens: int,
    precision: Precision,
    device: torch.device,
    workers: int,
    missing: Missing,
    progress: bool | None,
    observe: Callable[[TokenBatch, Tensor | None], None] | None = None,
) -> TokenEvaluation:
    """Measure a language model on documents of its tokens.

    Args:
        name: of the model, for messages.
        observe: takes each batch, and what `TokenMeasurement.add` returns for it.

    Raises:
        MismatchError: documents and labels do not belong together, or the model takes no documents that long.
    """
    assert documents.lengths is not None
    most, longest = model.longest, int(documents.lengths.max(initial=1))
    if most is not None and longest > most:
        raise MismatchError(
            f"model {name}: takes at most {most} tokens, the longest document has {longest}; give one of more positions"
        )
    packed = measure_leak(model) is None
    loader = TokenLoader(
        documents,
        store,
        batch_tokens=max(batch_tokens, longest),
        pack=longest if packed else None,
        pad=None if packed else longest,
        shuffle=False,
        missing=missing,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    batches = tqdm(loader, desc="evaluating", unit="batch", disable=None if progress is None else not progress)
    with evaluating(model.to(device)), contextlib.closing(loader):
        measurement = TokenMeasurement(model, device=device, precision=precision, packed=packed)
        for batch in batches:
            nats_P = measurement.add(moved := batch.to(device, non_blocking=True))
            if observe is not None:
                observe(moved, nats_P)
    return measurement.result()
