"""How far a run is, what came of it, and where its time goes, so that a user knows what to change."""

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
    """A moment of a run. Seconds are summed over lanes, so they may exceed `seconds`.

    Attributes:
        images: labelled or found bad so far.
        seconds: since the run began, on the wall's clock.
        waiting: spent on getting decoded images: decoding them, or waiting for the processes that do.
        forward: spent in the teachers; beside a GPU, waiting for it.
        encoding: combining, encoding, measuring what encoding costs, and putting shards together.
        writing: spent waiting for the writer.
        bare_rate: images/s of the teachers alone on a batch that is at hand already; None where it was not measured.
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
        """Throughput as a share of the bare forward pass's; None where that was not measured."""
        return self.images_per_second / self.bare_rate if self.bare_rate else None

    def share(self, activity: Activity) -> float:
        """Of the time spent on anything, the share of this, from 0 to 1."""
        spent = self.waiting + self.forward + self.encoding + self.writing
        return float(getattr(self, activity)) / spent if spent else 0.0


class Progress:
    """The one account of a run. Safe to use from several threads.

    Attributes:
        images: labelled or found bad; those of a shard that is labelled a second time count once.
        shards, rows: that were written; correct, labelled: rows whose hard label the labels hit, rows that have one.
        first_bad: the first image without a row.
    """

    def __init__(self, *, total: int = 0, done: int = 0, show: bool | None = False) -> None:
        """A bar over `total` images, `done` of them labelled before; show=None: if standard error is a terminal."""
        self.images = self.shards = self.rows = self.correct = self.labelled = 0
        self.first_bad: BadRow | None = None
        self.bare_rate: float | None = None
        self._spent = dict.fromkeys(ACTIVITIES, 0.0)
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        hidden = None if show is None else not show
        self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, desc="labelling", disable=hidden)

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
        """So many images more, or, negative, that many again; behind the bar a note, or what the time goes into."""
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

    def add_shard(self, *, rows: int, bad: Sequence[BadRow], correct: int, labelled: int) -> None:
        """A shard was written; its images are counted apart."""
        with self._lock:
            self.shards += 1
            self.rows += rows
            self.correct += correct
            self.labelled += labelled
            self.first_bad = self.first_bad or (bad[0] if bad else None)

    def pace(self) -> Pace:
        with self._lock:
            return Pace(
                images=self.images,
                seconds=time.perf_counter() - self._started,
                bare_rate=self.bare_rate,
                **self._spent,
            )
