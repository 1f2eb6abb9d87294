"""Progress of a run: counts, results, and where the time is spent."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from softlabel.store.manifest import BadRow

Activity = Literal["waiting", "forward", "encoding", "writing"]
ACTIVITIES: tuple[Activity, ...] = ("waiting", "forward", "encoding", "writing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Times of a run so far. Activities are summed over lanes, so they may exceed `seconds`.

    Attributes:
        images: labelled or bad so far.
        seconds: wall time since the run began.
        waiting: decoding images, or waiting for the decoding processes.
        forward: running the teachers, or waiting for the GPU.
        encoding: combining, encoding, measuring the cost, and joining batches.
        writing: waiting for the writer.
        bare_rate: images/s of the teachers alone on decoded batches; None if not measured.
    """

    images: int
    seconds: float
    waiting: float
    forward: float
    encoding: float
    writing: float
    bare_rate: float | None = None

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def against_bare(self) -> float | None:
        """Throughput as a share of `bare_rate`; None if that was not measured."""
        return self.images_per_second / self.bare_rate if self.bare_rate else None

    def share(self, activity: Activity) -> float:
        """Return the share of an activity in the time of all activities, 0 to 1."""
        spent = self.waiting + self.forward + self.encoding + self.writing
        return float(getattr(self, activity)) / spent if spent else 0.0


class Progress:
    """Counts of a run, with a progress bar; thread-safe.

    Args:
        total: images of the run.
        done: images labelled before.
        show: show the bar; None: if standard error is a terminal.

    Attributes:
        images: labelled or bad; a shard that is labelled twice counts once.
        shards, rows: written.
        correct, labelled: rows whose top class is the hard label, and rows with a hard label.
        truncated: rows of samples longer than a teacher takes.
        first_bad: the first image without a row.
    """

    def __init__(self, *, total: int = 0, done: int = 0, show: bool | None = False, unit: str = "sample") -> None:
        self.images = self.shards = self.rows = self.correct = self.labelled = self.truncated = 0
        self.first_bad: BadRow | None = None
        self.bare_rate: float | None = None
        self._spent = dict.fromkeys(ACTIVITIES, 0.0)
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        hidden = None if show is None else not show
        self._bar = tqdm(total=total, initial=done, unit=unit, unit_scale=True, desc="labelling", disable=hidden)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @contextmanager
    def spend(self, activity: Activity) -> Iterator[None]:
        """Count the time of the block towards an activity."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._spent[activity] += time.perf_counter() - started

    def count(self, images: int, note: str | None = None) -> None:
        """Add images, negative to retract them; show a note beside the bar, by default the shares of time."""
        with self._lock:
            self.images += images
        if not self._bar.disable:
            pace = self.pace()
            self._bar.set_postfix_str(
                note
                or f"data {pace.share('waiting'):.0%}, teachers {pace.share('forward') + pace.share('encoding'):.0%}, "
                f"writing {pace.share('writing'):.0%}",
                refresh=False,
            )
            self._bar.update(images)

    def add_shard(self, *, rows: int, bad: Sequence[BadRow], correct: int, labelled: int, truncated: int = 0) -> None:
        """Count a written shard; `count` counts its images."""
        with self._lock:
            self.shards += 1
            self.rows += rows
            self.correct += correct
            self.labelled += labelled
            self.truncated += truncated
            self.first_bad = self.first_bad or (bad[0] if bad else None)

    def pace(self) -> Pace:
        with self._lock:
            return Pace(
                images=self.images, seconds=time.perf_counter() - self._started, bare_rate=self.bare_rate, **self._spent
            )
