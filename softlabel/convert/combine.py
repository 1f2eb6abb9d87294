"""Combine the members of a store, or change its temperature.

Legend: B rows, C classes, M members, K kept classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from softlabel.common.arguments import check_arguments
from softlabel.convert.answers import StoredAnswers
from softlabel.convert.rewrite import Recode, RewriteSummary, Truth, encode_answers, open_whole, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError, UsageError
from softlabel.labels.combine import combine, normalized_weights, retemperable
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.columns import Array
from softlabel.store.manifest import Combine, Member, Run

LOWEST_HALF = -65504.0  # of float16


@check_arguments
def combine_store(
    store: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    members: Sequence[int | str] | None = None,
    combine: Literal["probs", "logits"] | None = None,
    temperature: float | None = None,
    progress: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> RewriteSummary:
    """Combine the members of a store that keeps them, or change the temperature of another one, without a teacher.

    The result is the store that `generate` would write with these members, weights, rule and temperature, up to the
    loss of the kept store's encoding. The same call resumes an interrupted one.

    Args:
        store: folder of a finished store.
        out: folder of the new one.
        weights: one number per chosen member, normalised to sum 1; None: equal.
        members: chosen members, by number (from 1, as in `softlabel inspect`) or SPEC; None: all.
        combine: ``logits`` averages logits (the default), ``probs`` the probabilities at `temperature`.
        temperature: of the new store; None: the same.
        progress: show a bar; None: if standard error is a terminal.
        options: JSON values to keep in the manifest under `recorded.options`.

    Raises:
        UsageError: an argument is wrong.
        MismatchError: the result would not be exact, or `out` holds another store.
        StoreError: a store cannot be read or written.
    """
    opened = open_whole(store, of="combine", out=out)
    opened.require_labels("combine")
    run = opened.run
    wanted = run.temperature if temperature is None else float(temperature)
    if not 0 < wanted < float("inf"):
        raise UsageError(f"temperature: expected a number above 0, found {temperature}")
    if combine not in (None, "logits", "probs"):
        raise UsageError(f"combine: expected 'logits' or 'probs', found {combine!r}")
    chosen: list[int] | None = None
    if run.kept:
        chosen = _choose_members(str(store), run.members, members)
        new = _make_combined_run(str(store), run, wanted, combine or "logits", weights, chosen)
    else:
        if weights is not None or members is not None:
            raise MismatchError(
                f"{store}: expected a store that keeps its members, found {len(run.members)} combined by rule "
                f"{run.combine.rule!r}; only its temperature can be changed; generate with --combine keep"
            )
        new = _make_retempered_run(str(store), run, wanted, combine)
    samples = Samples([opened])
    recode, truth = combine_recode(samples, new, chosen)
    specs = opened.manifest.recorded.get("teachers")
    recorded = {}
    if chosen is not None and isinstance(specs, list | tuple) and len(specs) == len(run.members):
        recorded["teachers"] = [specs[number] for number in chosen]
    return rewrite(
        samples, out, new, recode, command="combine", truth=truth, progress=progress, recorded=recorded, options=options
    )


def combine_recode(samples: Samples, new: Run, chosen: Sequence[int] | None = None) -> tuple[Recode, Truth]:
    """Return the function that converts answers of a store to those of `new`, and how their cost is known.

    Args:
        samples: of the store.
        new: combines its members or has another temperature.
        chosen: positions of the combined members; None: found by comparison.
    """
    run = samples.stores[0].run
    wanted = new.temperature
    measured: Truth = "measured" if run.encoding.exact and samples.measured else "unknown"
    if run.kept:
        mixed = _find_positions(run.members, new.members) if chosen is None else chosen

        def average(answers: StoredAnswers, meter: FidelityMeter) -> dict[str, Array]:
            scaled_BMC = torch.from_numpy(_rescale(answers, wanted))
            # They are already divided by the temperature.
            mixed_BC = combine(
                [scaled_BMC[:, m] for m in mixed],
                rule=new.combine.rule,
                temperature=1.0,
                weights=new.combine.weights,
                activation=run.activation,
            )
            return encode_answers(mixed_BC, answers, new, meter)

        return average, measured

    def retemper(answers: StoredAnswers, meter: FidelityMeter) -> dict[str, Array]:
        columns = run.encoding.retemper(answers.columns, run.temperature / wanted)
        if columns is None:
            return encode_answers(torch.from_numpy(_rescale(answers, wanted)), answers, new, meter)
        return {one.name: _narrow(columns[one.name], one.numpy) for one in run.label_columns}

    return retemper, measured


def _find_positions(members: Sequence[Member], chosen: Sequence[Member]) -> list[int]:
    """Return the positions of the chosen members, each once also among equal ones."""
    found: list[int] = []
    for one in chosen:
        found.append(next(place for place, member in enumerate(members) if member == one and place not in found))
    return found


def _make_combined_run(
    store: str, run: Run, wanted: float, rule: str, weights: Sequence[float] | None, chosen: Sequence[int]
) -> Run:
    shares = normalized_weights(weights, len(chosen))
    if run.encoding.drawn:
        raise MismatchError(
            f"{store}: random draws of each member's softmax cannot be combined into draws of their average; keep the "
            "members in another encoding"
        )
    _refuse_unknown(store, run, wanted)
    if run.features is not None and len(chosen) > 1:
        raise MismatchError(
            f"{store}: has the features of each member, whose average means nothing, found {len(chosen)} members to "
            "combine; choose one, --members NUMBER, or train from this store, which mixes its members as it is read"
        )
    return dataclasses.replace(
        run,
        features=None if run.features is None else run.features.of_members(chosen, kept=False),
        temperature=wanted,
        combine=Combine(rule=rule, weights=shares),
        members=tuple(run.members[number] for number in chosen),
        encoding=run.encoding.at_one_temperature(wanted),
    )


def _make_retempered_run(store: str, run: Run, wanted: float, rule: str | None) -> Run:
    if rule is not None and rule != run.combine.rule and len(run.members) > 1:
        raise MismatchError(
            f"{store}: combine: expected {run.combine.rule!r}, by which its members were combined, found {rule!r}; "
            "generate with --combine keep to choose later"
        )
    if wanted == run.temperature:
        raise UsageError(f"{store}: does not keep members and has temperature {wanted:g} already; nothing to do")
    if not retemperable(run.combine.rule, len(run.members)):
        raise MismatchError(
            f"{store}: the mean of {len(run.members)} teachers' probabilities at temperature {run.temperature:g} "
            f"cannot be changed exactly to {wanted:g}; use a store that keeps its members"
        )
    _refuse_unknown(store, run, wanted)
    if run.encoding.drawn:
        raise MismatchError(
            f"{store}: random draws from the softmax at temperature {run.temperature:g} are not exact at {wanted:g}; "
            "generate at that temperature, or in another encoding"
        )
    return dataclasses.replace(run, temperature=wanted)


def _rescale(answers: StoredAnswers, wanted: float) -> Array:
    """Return scaled logits at another temperature that the answers support: float32 (B, C), or (B, M, C)."""
    run = answers.run
    factor = run.temperature / wanted
    if (columns := run.encoding.retemper(answers.columns, factor)) is None:
        return answers.scaled_logits * np.float32(factor) if factor != 1 else answers.scaled_logits
    return run.encoding.decode(
        columns, num_classes=run.num_classes, temperature=wanted, members=run.members_stored, kept=run.kept
    )


def _narrow(values: Array, dtype: np.dtype[Any]) -> Array:
    if values.dtype != dtype == np.float16:  # keep finite values finite: -inf marks a masked class
        values = np.where(np.isneginf(values), values, np.clip(values, LOWEST_HALF, -LOWEST_HALF))
    return values.astype(dtype, copy=False)


def _refuse_unknown(store: str, run: Run, wanted: float) -> None:
    if not run.encoding.knows(wanted):
        known = ", ".join(f"{t:g}" for t in run.encoding.declared or ())
        raise MismatchError(
            f"{store}: encoding {run.encoding.title} knows the tail at temperatures {known}, found {wanted:g}; "
            "choose one of these, or generate with it among them"
        )


def _choose_members(store: str, members: Sequence[Member], asked: Sequence[int | str] | None) -> list[int]:
    if asked is None:
        return list(range(len(members)))
    chosen = [_find_member(store, members, one) for one in asked]
    if not chosen or len(set(chosen)) != len(chosen):
        raise UsageError(f"members: expected one or more, each once, found {list(asked)}")
    return chosen


def _find_member(store: str, members: Sequence[Member], one: int | str) -> int:
    """Return the position from 0 of a member given by its number from 1 or its SPEC."""
    listed = ", ".join(f"{number} {member.spec}" for number, member in enumerate(members, 1))
    if isinstance(one, int) or one.isdecimal():
        if 1 <= int(one) <= len(members):
            return int(one) - 1
        raise UsageError(f"members: expected one of {listed} in {store}, found {one}")
    found = [position for position, member in enumerate(members) if member.spec == one]
    if len(found) != 1:
        raise UsageError(
            f"members: expected one of {listed} in {store}, found {one!r}, which names {len(found)}; give a number"
        )
    return found[0]
