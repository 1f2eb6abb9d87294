"""Where the time of labelling goes, so that a user knows what to change.

A meter is filled by the engine, from any of its threads; `pace()` gives what it holds at this moment.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Activity = Literal["waiting", "forward", "encoding", "writing"]
ACTIVITIES: tuple[Activity, ...] = ("waiting", "forward", "encoding", "writing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """A moment of a run. Seconds are summed over the engine's lanes, so they may exceed `seconds`.

    Attributes:
        images: labelled or found bad so far.
        seconds: since the meter was made, on the wall's clock.
        waiting: spent on getting decoded images: decoding them, or waiting for the processes that do.
        forward: spent in the teachers; beside a GPU, waiting for it.
        encoding: combining, encoding, measuring what encoding costs, and putting shards together.
        writing: spent waiting for the writer.
        bare_rate: images/s of the teachers alone on a batch that is at hand already; None where nobody measured it.
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


class PaceMeter:
    """What a `Pace` is read from. Safe to use from several threads."""

    def __init__(self) -> None:
        self.bare_rate: float | None = None
        self._images = 0
        self._spent = dict.fromkeys(ACTIVITIES, 0.0)
        self._started = time.perf_counter()
        self._lock = threading.Lock()

    @contextmanager
    def spend(self, activity: Activity) -> Iterator[None]:
        """Count the time of the block towards an activity."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._spent[activity] += time.perf_counter() - started

    def count(self, images: int) -> None:
        with self._lock:
            self._images += images

    def pace(self) -> Pace:
        with self._lock:
            return Pace(
                images=self._images,
                seconds=time.perf_counter() - self._started,
                bare_rate=self.bare_rate,
                **self._spent,
            )
