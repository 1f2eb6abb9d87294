"""The sections of a report that are about a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from softlabel.report.about import describe_encoding, describe_store
from softlabel.report.agreement import AgreementMeter
from softlabel.report.calibration import measure_calibration
from softlabel.report.confusion import measure_confusion
from softlabel.report.coverage import CoverageMeter
from softlabel.report.ensemble import measure_ensemble
from softlabel.report.examples import ExampleReader
from softlabel.report.figures import (
    About,
    Absent,
    Agreement,
    Calibration,
    Confusion,
    Coverage,
    EncodingCost,
    Ensemble,
    Noise,
    Sharpness,
    Views,
)
from softlabel.report.noise import NoiseMeter, Ranking
from softlabel.report.probabilities import LabelReader
from softlabel.report.sharpness import measure_sharpness
from softlabel.report.store_pass import run_pass
from softlabel.report.views import ViewMeter
from softlabel.store.reader import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFigures:
    """What was measured of a store: sections of a `Report`, by their names there.

    Attributes:
        ranking: all candidates of `noise`; None where it is absent.
    """

    about: About
    agreement: Agreement | Absent
    noise: Noise | Absent
    calibration: Calibration | Absent
    sharpness: Sharpness | Absent
    confusion: Confusion | Absent
    ensemble: Ensemble | Absent
    views: Views | Absent
    encoding: EncodingCost
    coverage: Coverage
    ranking: Ranking | None = field(compare=False, repr=False)


def measure_store(store: Store, *, progress: bool | None = None) -> StoreFigures:
    """Measure a store in one pass.

    What needs a few numbers of every row is a meter; see `softlabel.report.store_pass.Meter` for how one is added. What
    needs all classes or members of a row is measured on the sample of at most 50,000 rows that the pass returns.

    Args:
        store: open, see `softlabel.open_store`.
        progress: show a bar; None: if standard error is a terminal.

    Raises:
        MismatchError: the store has hard labels that its teachers have no class for.
        StoreCorruptError: a shard is missing or damaged.
    """
    reader = LabelReader(store)
    agreement, noise, coverage = AgreementMeter(reader), NoiseMeter(store, reader), CoverageMeter(store)
    views = ViewMeter(store.run)
    sample = run_pass(store, reader, [agreement, noise, coverage, views], progress=progress)
    with use_one_thread():
        examples = ExampleReader(store, reader)
        about, found = describe_store(store, reader, measured=len(sample)), coverage.result(examples)
        if (why := _find_obstacle(store, found)) is not None:
            return StoreFigures(
                about=about,
                agreement=why,
                noise=why,
                calibration=why,
                sharpness=why,
                confusion=why,
                ensemble=why,
                views=why,
                encoding=describe_encoding(store),
                coverage=found,
                ranking=None,
            )
        return StoreFigures(
            about=about,
            agreement=agreement.result(),
            noise=noise.result(examples),
            calibration=measure_calibration(sample),
            sharpness=measure_sharpness(sample),
            confusion=measure_confusion(sample),
            ensemble=measure_ensemble(sample, examples),
            views=views.result(sample, examples),
            encoding=describe_encoding(store),
            coverage=found,
            ranking=noise.ranking,
        )


def _find_obstacle(store: Store, found: Coverage) -> Absent | None:
    """Why nothing can be measured of the labels; None where it can."""
    if found.bad_count == found.samples:
        return Absent(
            reason=f"none of the {found.samples:,} samples could be read; 'softlabel inspect {store.url}' says why"
        )
    if found.non_finite:
        return Absent(
            reason=f"{found.non_finite:,} of {len(store):,} rows of the store hold numbers that are not finite; "
            f"'softlabel verify {store.url}' names them"
        )
    return None


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Compute in one thread: several would mostly wait for one another, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
