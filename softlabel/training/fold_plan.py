"""What a cross-fitting is: the data with their folds, the settings, where everything lies, and what was begun there.

Legend: N samples, C classes.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from softlabel.common.multi_hot import is_labelled
from softlabel.common.spec import parse_spec, quote_path
from softlabel.dataset import Source, detect_decoding, open_source, report_source, require_samples
from softlabel.dataset.findings import Findings
from softlabel.dataset.folds import Choice, ChosenSource, assign_folds
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.generation.config import GenerateConfig
from softlabel.models import names_language_model
from softlabel.store.encodings import Encoding, fitted
from softlabel.store.manifest import DatasetInfo, Totals
from softlabel.store.manifest_read import find_root
from softlabel.store.storage.open import open_folder
from softlabel.store.strict_json import from_json, to_json
from softlabel.training import run_folder
from softlabel.training.config import TrainConfig
from softlabel.training.grid import StudentConfig, students_of

log = logging.getLogger("softlabel")

# Options of `TrainConfig` about soft labels, about several sources, students or processes, and those of `crossfit`.
_OTHERS = {"labels", "temperature", "combine", "weights", "soft_weight", "hard_weight", "view_order", "check_views"} | {
    *("loss", "soft_warmup", "fix_labels", "confidence", "embedding_loss", "embedding_weight", "embedding_projector"),
    "difference_weight",
    *("missing", "ignore_labels", "source_ratio", "students_at_once", "stack", "step", "sync_batchnorm", "overwrite"),
    *("data", "student", "out"),
    *("pack", "pad", "batch_tokens"),
}
TRAINING = tuple(field.name for field in fields(TrainConfig) if field.name not in _OTHERS)
FOLDS = "crossfit"  # name in `manifest.recorded` of the number of folds
SETTINGS = "crossfit_settings"  # the same of the identity
_STATE = "crossfit.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldPlan:
    """What all folds share; `assigned` has the fold of each sample from 0, int64 (N,)."""

    source: Source
    assigned: NDArray[np.int64]
    folds: int
    config: TrainConfig
    student: StudentConfig
    out: str

    @property
    def folder(self) -> Path:
        return Path(f"{self.out}.folds")

    def labels(self, number: int) -> str:
        return str(self.folder / f"labels-{number}")

    def teacher(self, number: int) -> str:
        """Return the SPEC of the teacher without fold `number`, counted from 1."""
        return f"run:{quote_path(str(self.folder / f'teacher-{number}'))}"

    def choose(self, number: int, *, outside: bool) -> Source:
        """Return the samples of a fold, or the labelled ones of all others."""
        labelled_N = is_labelled(self.source.labels())
        chosen_N = (self.assigned == number - 1) != outside
        only = outside and not bool(labelled_N.all())
        choice = Choice(fold=number, folds=self.folds, seed=self.config.seed, outside=outside, labelled=only)
        rows_N = np.flatnonzero(chosen_N & labelled_N if only else chosen_N)
        chosen = ChosenSource(self.source, rows_N, choice, name=choice.name(self.source.name))
        chosen.findings = Findings()  # reported once, of the whole
        chosen.has_labels = self.source.has_labels  # the stores of all folds have the same columns
        return chosen


def make_plan(
    data: "str | Path | Source | Dataset[Any]",
    student: str,
    out: str,
    folds: int,
    key_fn: Callable[[int], str | int] | None,
    training: Mapping[str, Any],
) -> FoldPlan:
    """Open the data, assign the folds and check the settings; writes nothing. Arguments and errors as in `crossfit`."""
    if odd := sorted(set(training) - set(TRAINING)):
        raise UsageError(f"{odd[0]}: expected an option of crossfit, such as {', '.join(TRAINING[2:5])}; leave it out")
    if not 2 <= folds <= 1000:
        raise UsageError(f"folds: expected 2 to 1000, found {folds}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("crossfit: expected one process, found several (WORLD_SIZE); start it without torchrun")
    if "://" in out:
        raise UsageError(f"out: expected a local path, found {out!r}; copy the finished store there")
    out = os.path.expanduser(out).rstrip("/")
    source = open_source(data, key_fn=key_fn)
    if isinstance(source, ChosenSource) and source.choice.fold is not None:
        raise UsageError(f"{source.name}: crossfit itself has to name fold= or without_fold=; leave it out")
    require_samples(source)
    report_source(source)
    source = detect_decoding(source)  # once: a fold alone might have other images
    config = TrainConfig(data=source.name, student=student, out=out, **training)
    students = students_of(config)
    if len(students) > 1:
        raise UsageError("crossfit: expected one value of each option, found several; cross-fit one after the other")
    if names_language_model(parse_spec(student)):
        raise UsageError(
            f"student {student}: expected a classifier, found a language model, whose documents have no class to be "
            "held out; train it on a part of the data ('?without_fold=2/4'), and label the rest with it ('?fold=2/4')"
        )
    if parse_spec(student).starts_trained:
        log.warning(
            "warning: student %s: starts from trained weights; if they saw samples of %s, no label is out-of-sample",
            student,
            source.name,
        )
    folds_N = assign_folds(source.key_table(), folds, config.seed)
    _check_folds(source, folds_N, folds)
    return FoldPlan(source=source, assigned=folds_N, folds=folds, config=config, student=students[0], out=out)


def _check_folds(source: Source, folds_N: NDArray[np.int64], folds: int) -> None:
    """Refuse folds that nothing can be learned or labelled with; warn of classes that a teacher does not see."""
    labels = source.labels()
    labelled_N = is_labelled(labels)
    if not labelled_N.any():
        raise DataError(f"{source.name}: no sample has a hard label; cross-fitting trains its teachers on them")
    for fold in range(folds):
        inside_N = folds_N == fold
        if not inside_N.any() or not labelled_N[~inside_N].any():
            what = "sample" if not inside_N.any() else "hard label outside it"
            raise DataError(
                f"{source.name}: fold {fold + 1} of {folds} has no {what}: {len(source):,} samples with "
                f"{int(labelled_N.sum()):,} hard labels are too few; use fewer --folds, or another --seed"
            )
        lost = np.flatnonzero((_count_classes(labels) > 0) & (_count_classes(labels[~inside_N], labels) == 0)).tolist()
        if lost:
            log.warning(
                "warning: %s: the teacher without fold %d sees no sample of class %s; use more samples, or more folds",
                source.name,
                fold + 1,
                ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else ""),
            )


def _count_classes(labels: NDArray[Any], like: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """Count the samples of each class, (C,); C is that of `like`."""
    if labels.ndim == 2:
        return np.asarray((labels > 0).sum(axis=0), np.int64)
    most = int((labels if like is None else like).max(initial=-1)) + 1
    return np.bincount(labels[labels >= 0], minlength=most).astype(np.int64)


def check_labelling(
    config: TrainConfig, *, encoding: Encoding | str, there: Encoding | None, **others: Any
) -> GenerateConfig:
    """Return how folds are labelled; the activation follows from the teacher, once there is one. `there` is the
    encoding of what is continued."""
    temperature = float(others["temperature"])
    try:
        chosen = fitted(encoding, temperature=temperature, there=there)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if chosen.from_hidden:
        raise UsageError(
            f"encoding {chosen.name}: stores the last layer of one teacher, found several, one a fold; use another one"
        )
    assert config.batch_size is not None
    return GenerateConfig(
        **others,
        encoding=chosen,
        batch_size=2 * config.batch_size,  # without a backward pass twice as many fit
        precision="fp32" if config.precision == "auto" else config.precision,
        seed=config.seed,
        device=config.device,
        workers=config.workers,
        compile=config.compile,
    )


def find_encoding(plan: FoldPlan) -> Encoding | None:
    """Return the encoding of the store or the folds that are continued; None: there are none that can be read."""
    if (manifest := find_root(open_folder(plan.out))) is not None:
        return manifest.run.encoding
    try:
        there = json.loads((plan.folder / _STATE).read_text(encoding="utf-8"))
        return from_json(Encoding, there["encoding"])  # type: ignore[type-abstract]  # a table of them
    except (OSError, ValueError, LookupError, TypeError):
        return None  # `hold_folder` reports a file that is damaged


def describe_dataset(source: Source) -> DatasetInfo:
    """Return the whole dataset as a manifest has it."""
    return DatasetInfo(
        kind=source.kind, rows=len(source), fingerprint=source.fingerprint(), has_labels=source.has_labels
    )


def describe_identity(plan: FoldPlan, how: GenerateConfig) -> dict[str, Any]:
    """Return what decides the labels: work is continued only if all of it is the same."""
    labels = plan.source.labels()
    assert isinstance(how.encoding, Encoding)
    found = {
        "folds": plan.folds,
        run_folder.DATA_KEYS: plan.source.fingerprint(),
        "hard labels (fingerprint)": hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
        **plan.student.identity(),
        "augment": plan.config.augmentation(None, plan.source.inputs),
        "temperature": how.temperature,
        "encoding": to_json(how.encoding),
        "format": how.format,
        "shard_rows": how.shard_rows,
    }
    normal: dict[str, Any] = json.loads(json.dumps(found))
    return normal


def check_out(out: str, identity: Mapping[str, Any]) -> Totals | None:
    """Return the totals of the store at `out` if it is complete.

    Raises:
        MismatchError: it is another one.
    """
    if (manifest := find_root(open_folder(out))) is None:
        return None
    there = manifest.recorded.get(SETTINGS)
    if not isinstance(there, Mapping):
        raise MismatchError(f"{out}: expected no store, or one begun by 'softlabel crossfit', found another one")
    _refuse_differences(out, there, identity)
    return manifest.totals if manifest.complete else None


def hold_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of the folds, or check that it belongs to this plan."""
    path = folder / _STATE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(_STATE)]
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: cannot be used for the folds: {error}; choose another --out") from error
    if there is None and others:
        raise UsageError(f"{folder}: expected the folds of an earlier call, or nothing, found {others[0]}")
    # Refused before its first step, for its student perhaps: then there is nothing to protect.
    if there is not None and any(run_folder.recorded_identity(folder / name) for name in others):
        _refuse_differences(str(folder), there, identity)
    run_folder.write_atomically(path, json.dumps(identity, indent=2).encode() + b"\n")


def _refuse_differences(where: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if differences := run_folder.list_differences(there, here):
        raise MismatchError(
            f"{where}: was cross-fitted with other settings; {'; '.join(differences)}. Use the same settings or "
            "another --out, or remove it and the folder of its folds"
        )
