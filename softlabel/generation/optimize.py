"""Find the fastest way to compute each teacher on a CPU: eager, with folded batch norms, or compiled.

Legend: B batch, C classes, R rows of a pass.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from softlabel.common.device import Tuning
from softlabel.errors import DataError, TeacherError, UsageError, one_line
from softlabel.generation.config import GenerateConfig
from softlabel.generation.ensemble import Members, using_threads
from softlabel.generation.input_reader import InputReader
from softlabel.inputs.base import Inputs
from softlabel.inputs.image_transform import Preprocessing
from softlabel.models import LanguageModel, Program
from softlabel.models.graph import Engine, make_graph_network
from softlabel.models.teacher import Teacher

log = logging.getLogger("softlabel")

OPTIMIZED = "optimized"  # name in `manifest.recorded` of how each teacher is computed

# Largest difference of logits from eager ones, relative to the largest of them, of what may be chosen.
TOLERANCE = 1e-5
_WORTH = 0.97  # share of eager's time below which another way is chosen
# CPU seconds of a run from which a trial of folding (about 5), and of compiling (about 20), pays.
_SHORTEST_TO_FOLD, _SHORTEST_TO_COMPILE = 100.0, 200.0
_TRIAL_VALUES = 3 * 2**19  # numbers in a pass at most: 512 images of CIFAR, 10 of ImageNet
_ROUNDS = 3
_SAMPLES = 64  # samples tried beyond a batch, to find some that can be decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """How a teacher is computed; `rows` is the number of samples of a pass, None if eager: that of a batch."""

    engine: Engine = "eager"
    rows: int | None = None

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Self:
        """Restore from `to_dict`."""
        return cls(engine=recorded["engine"], rows=recorded.get("rows"))

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for a manifest."""
        return {"engine": self.engine} | ({} if self.rows is None else {"rows": self.rows})


def keep_optimization(out: str | Path, config: GenerateConfig, recorded: Mapping[str, Any]) -> GenerateConfig:
    """The configuration with which a store goes on: its other shards are computed as the first ones were, which a line
    reports where the options ask for something else.

    Args:
        out: of the store, for messages.
        config: as given.
        recorded: of its manifest.

    Raises:
        UsageError: an option excludes how the first shards were computed.
    """
    engines = sorted({Optimization.of(one).engine for one in recorded.get(OPTIMIZED) or ()} or {"eager"})
    is_eager, how = engines == ["eager"], " and ".join(engines)
    if [config.optimize] != (["none"] if is_eager else engines):
        why = {"none": "", "auto": ", without a trial"}
        other = why.get(config.optimize, f", not {config.optimize}; label into another folder for that")
        log.warning("optimize: %s: its shards were computed %s, and the others are too%s", out, how, other)
    if is_eager:
        return replace(config, optimize="none")
    kept = replace(config, optimize="auto")
    try:
        _ = kept.tuning
    except UsageError as error:
        raise UsageError(f"{out}: its shards were computed {how}, and the others have to be too: {error}") from None
    return kept


def optimize_teachers(
    members: Members,
    reader: InputReader,
    tuning: Tuning,
    *,
    batch_size: int,
    samples: int,
    captured: str | None,
    before: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[Teacher], list[Optimization]]:
    """Compute the teachers as `tuning.optimize` asks, or, with ``auto``, as a store's shards were computed before.

    Args:
        members: the loaded teachers.
        reader: of the run's samples.
        tuning: what is asked, and the threads of a lane.
        batch_size: samples of a batch.
        samples: that the run labels, counting views.
        captured: what of the store is taken from a layer of each teacher; None: nothing.
        before: recorded choices of the store.

    Returns:
        The teachers, and how each is computed.

    Raises:
        UsageError: a way other than ``auto`` is asked of a teacher that cannot be computed so.
        TeacherError: its logits are beyond the tolerance.
        DataError: no sample can be decoded.
    """
    chosen = []
    recorded = [Optimization.of(one) for one in before or ()]
    if len(recorded) != len(members.teachers) or tuning.optimize != "auto":
        recorded = []
    for number, teacher in enumerate(members.teachers):
        reason = _find_obstacle(members, teacher, captured=captured)
        trial = _Trial(teacher, tuning, batch_size, lambda rows, number=number: _read(members, reader, number, rows))  # type: ignore[misc]
        if reason is not None and tuning.optimize != "auto":
            raise UsageError(f"optimize: {teacher.spec.text}: {reason}; leave out --optimize {tuning.optimize}")
        with using_threads(tuning.lanes(members.device)[1]):
            if reason is not None:
                found = trial.choose_eager(reason)
            elif recorded:
                found = trial.repeat(recorded[number])
            elif tuning.optimize == "auto":
                found = trial.find_fastest(samples)
            else:
                assert tuning.optimize in ("folded", "compiled")
                found = trial.make(tuning.optimize)
        chosen.append(found)
    how = [
        Optimization() if found.graph is None else Optimization(engine=found.graph.engine, rows=found.graph.rows)
        for found in chosen
    ]
    return chosen, how


def _find_obstacle(members: Members, teacher: Teacher, *, captured: str | None) -> str | None:
    """Why a teacher can only be computed as it is."""
    if members.device.type != "cpu":
        return f"graphs are for CPUs, found {members.device} (--compile is for GPUs)"
    if isinstance(teacher.model, Program):
        return "is a program file, not a torch module"
    if teacher.precision != "fp32":
        return f"graphs are in fp32, found {teacher.precision}"
    if captured is not None:
        return f"{captured} captures a layer, which graphs do not have"
    if isinstance(teacher.model, LanguageModel):
        return "language models answer position by position"
    if teacher.preprocessing.buckets:
        return "takes batches of many lengths"
    if teacher.preprocessing.kind == Preprocessing.kind and not teacher.preprocessing.fixes_size:
        return "takes images of many sizes"
    if members.in_turn:
        return "members run in turn"
    return None


def _read(members: Members, reader: InputReader, number: int, rows: int) -> Inputs:
    """Samples of the run as inputs of a teacher; some are repeated where there are not enough."""
    batch = reader.batch(range(min(len(reader.source), rows + _SAMPLES)))
    if not batch.keys:
        raise DataError(f"{reader.source.name}: none of its first samples can be decoded")
    found = batch.inputs[members.transform_of[number]]
    # Slices and joined batches keep the memory layout, for which a graph is made; chosen rows do not.
    return Inputs.join([found] * -(-rows // len(found)))[:rows] if len(found) < rows else found[:rows]


class _Trial:
    """Tries ways to compute one teacher on samples of the run.

    Args:
        teacher: as it was loaded.
        tuning: what is asked.
        batch_size: samples of a batch.
        read: reads so many samples.
    """

    def __init__(self, teacher: Teacher, tuning: Tuning, batch_size: int, read: Callable[[int], Inputs]) -> None:
        self.teacher, self.tuning, self.batch_size, self.read = teacher, tuning, batch_size, read
        self.name = teacher.spec.text

    def choose_eager(self, reason: str) -> Teacher:
        log.warning("optimize: %s: eager (%s)", self.name, reason)
        return self.teacher

    def make(self, engine: Literal["folded", "compiled"]) -> Teacher:
        """Compute the teacher as asked.

        Raises:
            UsageError, TeacherError: it cannot be, or gives other logits.
        """
        batch = self.read(self._count_rows())
        expected_BC = self.teacher.logits(batch)
        try:
            found = self._make_graph(engine, batch)
        except Exception as error:
            raise UsageError(
                f"optimize: {self.name}: cannot be {engine}: {_describe(error)}; leave out --optimize {engine}"
            ) from error
        off = measure_difference(found.logits(batch), expected_BC)
        if not off <= TOLERANCE:
            raise TeacherError(
                f"{self.name}: {engine}, its logits differ by {off:.1e} of the largest, allowed {TOLERANCE:.0e}; leave "
                f"out --optimize {engine}"
            )
        assert found.graph is not None
        if engine == "folded" and not found.graph.folded:
            raise UsageError(
                f"optimize: {self.name}: expected batch norms after convolutions, found none; leave out --optimize "
                "folded"
            )
        log.info("optimize: %s: %s, as requested", self.name, engine)
        return found

    def repeat(self, before: Optimization) -> Teacher:
        """Compute the teacher as a store's shards were computed."""
        if before.engine == "eager":
            return self.teacher
        assert before.rows is not None, "the record of a graph has its rows"
        batch = self.read(before.rows)
        expected_BC = self.teacher.logits(batch)
        try:
            found = self._make_graph(before.engine, batch)
            off = measure_difference(found.logits(batch), expected_BC)
        except Exception as error:
            return self.choose_eager(f"the store was {before.engine}, which fails here: {_describe(error)}")
        if not off <= TOLERANCE:
            return self.choose_eager(
                f"the store was {before.engine}, whose logits differ here by {off:.1e} of the largest"
            )
        log.info("optimize: %s: %s, as before", self.name, before.engine)
        return found

    def find_fastest(self, samples: int) -> Teacher:
        """Time the ways to compute the teacher on samples of the run, and choose the fastest within the tolerance."""
        most = self._count_rows()
        batch = self.read(most)
        expected_BC, once = self.teacher.logits(batch), self._time([self.teacher], batch)[0]
        whole = once / most * samples
        if whole < _SHORTEST_TO_FOLD:
            return self.choose_eager(f"the run takes about {whole:.0f} s of a CPU, too short for a trial")
        ways, failed = [self.teacher], []

        def add(engine: Literal["folded", "compiled"], rows: int) -> None:
            try:
                made = self._make_graph(engine, batch[:rows])
                off = measure_difference(made.logits(batch), expected_BC)
            except Exception as error:  # what torch raises for this network
                failed.append(f"not {engine}: {_describe(error)}")
                return
            assert made.graph is not None
            if engine == "folded" and not made.graph.folded:
                return  # the plain network by another name
            if off <= TOLERANCE:
                ways.append(made)
            else:
                failed.append(f"{engine}: logits differ by {off:.1e} of the largest")

        for rows in dict.fromkeys((most, _largest_divisor(most, most // 4))):
            add("folded", rows)
            if failed:
                break
        seconds = self._time(ways, batch)
        if whole >= _SHORTEST_TO_COMPILE and not failed:
            fastest = ways[min(range(len(ways)), key=lambda place: seconds[place])].graph
            for rows in dict.fromkeys((most, most if fastest is None else fastest.rows)):
                add("compiled", rows)
            seconds = self._time(ways, batch)
        best = min(range(len(ways)), key=lambda place: seconds[place])
        ratio = seconds[best] / seconds[0]
        if best == 0 or ratio > _WORTH:
            return self.choose_eager("; ".join(failed) or "no other way is faster")
        graph = ways[best].graph
        assert graph is not None
        log.warning(
            "optimize: %s: %s, %d samples a pass: %.2f of the CPU time of the eager network%s",
            self.name,
            "batch norms folded" if graph.engine == "folded" else "compiled",
            graph.rows,
            ratio,
            "".join(f" ({text})" for text in failed),
        )
        return ways[best]

    def _count_rows(self) -> int:
        """Samples of a pass: a batch, or an equal part of one that is large."""
        values = sum(tensor.numel() for tensor in self.read(1).tensors.values())
        return _largest_divisor(self.batch_size, _TRIAL_VALUES // max(1, values))

    def _make_graph(self, engine: Literal["folded", "compiled"], batch: Inputs) -> Teacher:
        with torch.no_grad():
            finished = self.teacher.preprocessing.finish(batch)
        graph = make_graph_network(self.name, self.teacher.model, finished, engine)
        return replace(self.teacher, graph=graph)

    def _time(self, ways: Sequence[Teacher], batch: Inputs) -> list[float]:
        """CPU seconds of this process, the least of some interleaved rounds."""
        seconds = [float("inf")] * len(ways)
        for _ in range(_ROUNDS):
            for place, way in enumerate(ways):
                started = time.process_time()
                way.logits(batch)
                seconds[place] = min(seconds[place], time.process_time() - started)
        return seconds


def measure_difference(found_BC: Tensor, expected_BC: Tensor) -> float:
    """Largest difference of logits relative to the largest; masked classes (-inf) must be equal, NaN never is."""
    if not torch.equal(found_BC.isfinite(), expected_BC.isfinite()):
        return float("inf")
    finite = expected_BC.isfinite()
    largest = expected_BC[finite].abs().max() if finite.any() else torch.tensor(1.0)
    difference = (found_BC - expected_BC)[finite].abs().max() if finite.any() else torch.tensor(0.0)
    return float(difference / largest) if difference else 0.0


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(max(1, min(number, most)), 0, -1) if number % size == 0)


def _describe(error: Exception) -> str:
    return one_line(error, with_type=True)[:200]
