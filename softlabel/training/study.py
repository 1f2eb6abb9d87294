"""The trials of a search: drawn by Optuna's sampler, and kept in Optuna's storage, a journal file that resumes.

This file alone imports Optuna, when it is used.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softlabel.errors import TrainingError, UsageError, one_line
from softlabel.training.losses import LOSSES
from softlabel.training.search_space import RANGES, Range, SearchSpace

if TYPE_CHECKING:
    import optuna

State = Literal["open", "done", "halved", "failed"]

_NAME = "softlabel"
# What a trial is in the storage.
_SETTINGS, _PASS, _STATE = "settings", "pass", "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One student of a search.

    Attributes:
        number: of the trial, from 0.
        of_pass: number of the pass that trains it, from 1.
        settings: loss, lr, temperature, soft_weight, hard_weight.
        state: open: not trained yet; done: trained to the end; halved: not among the best on the way; failed: the loss
            was not finite.
        scores: epoch -> accuracy on the samples held out (mAP of several labels at once).
    """

    number: int
    of_pass: int
    settings: Mapping[str, Any]
    state: State
    scores: Mapping[int, float]

    @property
    def score(self) -> float | None:
        """The last one."""
        return self.scores[max(self.scores)] if self.scores else None


def require_optuna() -> None:
    """Raises UsageError: Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("tune: needs Optuna, which is not installed; pip install 'softlabel[tune]'")


class Study:
    """See the module.

    Args:
        path: of the journal; a new one is made.
        space: what is searched.
        seed: of the sampler.

    Raises:
        TrainingError: the file is damaged.
        UsageError: Optuna is not installed.
    """

    def __init__(self, path: Path, space: SearchSpace, *, seed: int) -> None:
        require_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self._space, self._seed = space, seed
        try:
            with _quietly():
                self._storage = JournalStorage(JournalFileBackend(str(path)))
                self._open_study()
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"{path}: cannot be read: {one_line(error)}; use another --out") from error

    def list_trials(self) -> list[Trial]:
        """Return all trials in the order in which they were drawn."""
        found = []
        for one in self._open_study().trials:
            attributes = one.user_attrs
            if _SETTINGS in attributes:  # else the process ended while it was drawn
                found.append(
                    Trial(
                        number=one.number,
                        of_pass=attributes[_PASS],
                        settings=attributes[_SETTINGS],
                        state=attributes.get(_STATE, "open"),
                        scores=dict(one.intermediate_values),
                    )
                )
        return found

    def draw(self, of_pass: int, count: int, first: Sequence[Mapping[str, Any]] = ()) -> list[Trial]:
        """Return the trials of a pass; those that are missing are drawn.

        Args:
            of_pass: number of the pass.
            count: how many trials it has.
            first: settings with which its trials begin, in place of drawn ones.
        """
        with _quietly():
            there = [trial for trial in self.list_trials() if trial.of_pass == of_pass]
            for number in range(len(there), count):
                study = self._open_study()
                if number < len(first):
                    study.enqueue_trial({name: value for name, value in first[number].items() if value is not None})
                trial = study.ask()
                settings = self._suggest(trial)
                if number < len(first):
                    settings = dict(first[number])  # unrounded
                trial.set_user_attr(_PASS, of_pass)
                trial.set_user_attr(_SETTINGS, settings)
        return [trial for trial in self.list_trials() if trial.of_pass == of_pass]

    def close(self, trial: Trial, state: State, scores: Mapping[int, float]) -> None:
        """Record what became of a trial."""
        from optuna.trial import Trial as OptunaTrial
        from optuna.trial import TrialState

        with _quietly():
            study = self._open_study()
            stored = study.trials[trial.number]
            live = OptunaTrial(study, stored._trial_id)
            for epoch, score in scores.items():
                if epoch not in stored.intermediate_values:
                    live.report(score, epoch)
            live.set_user_attr(_STATE, state)
            states = {"halved": TrialState.PRUNED, "failed": TrialState.FAIL}
            value = scores[max(scores)] if state == "done" else None
            study.tell(trial.number, value, state=states.get(state))

    def _suggest(self, trial: "optuna.trial.Trial") -> dict[str, Any]:
        drawn = trial.suggest_categorical("loss", self._space.losses)
        loss = next(one for one in self._space.losses if one == drawn)
        settings: dict[str, Any] = {"loss": loss}
        for name in RANGES:
            one = self._space.ranges[name]
            if name == "temperature" and LOSSES[loss].fixed:
                settings[name] = None
            elif one.low == one.high:
                settings[name] = one.low
            else:
                settings[name] = _round(trial.suggest_float(name, one.low, one.high, log=one.log), one)
        return settings

    def _open_study(self) -> "optuna.study.Study":
        import optuna

        with _quietly():
            study = optuna.create_study(
                study_name=_NAME, storage=self._storage, direction="maximize", load_if_exists=True
            )
            # The number of trials is what makes draws after an interruption others than those before it.
            drawn = len(study.trials)
            study.sampler = optuna.samplers.TPESampler(
                seed=self._seed + drawn, multivariate=True, group=True, constant_liar=True
            )
        return study


def _round(value: float, to: Range) -> float:
    """Return a number of three digits, as commands show it, within its range."""
    return min(max(float(f"{value:.3g}"), to.low), to.high)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what Optuna says of its experimental parts and of every trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
