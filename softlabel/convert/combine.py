"""Members -> one combined store, and one temperature -> another.

Legend: B rows, C classes, M members, K kept classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from softlabel.common.arguments import check_arguments
from softlabel.convert.rewrite import Recode, RewriteSummary, Truth, encoded, keep_columns, open_whole, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError, UsageError
from softlabel.labels.combine import combine, normalized_weights, retemperable
from softlabel.labels.encode import FidelityMeter
from softlabel.store.columns import Array
from softlabel.store.decode import decode
from softlabel.store.manifest import Combine, Member, Run
from softlabel.store.stored_rows import StoredRows

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
    """Combine the members of a store that kept them, or change the temperature of one that did not, without a teacher.

    The result is the store that `generate` would have written with these members, weights, rule and temperature, within
    what the kept store's encoding costs. The same call again resumes what was interrupted.

    Args:
        store: folder of a finished store.
        out: folder of the new one.
        weights: one number for each chosen member, normalised to sum 1; equal when absent.
        members: the chosen ones, by number (from 1, as `softlabel inspect` lists them) or by SPEC; all when absent.
        combine: ``logits`` averages logits (the default), ``probs`` the softmax at `temperature`.
        temperature: of the new store; the store's own when absent.
        progress: show a bar; absent: if standard error is a terminal.
        options: as JSON takes it: what the caller was given, kept in the manifest under `recorded.options`.

    Raises:
        UsageError: a request that cannot be. MismatchError: it is not exact with what this store holds, or `out` holds
            another store.
        StoreError: a store cannot be read or written.
    """
    opened = open_whole(store, of="combine", out=out)
    run = opened.run
    wanted = run.temperature if temperature is None else float(temperature)
    if not 0 < wanted < float("inf"):
        raise UsageError(f"temperature: expected a number above 0, found {temperature}")
    if combine not in (None, "logits", "probs"):
        raise UsageError(f"combine: expected 'logits' or 'probs', found {combine!r}")
    chosen: list[int] | None = None
    if run.kept:
        chosen = _chosen(str(store), run.members, members)
        new = _mixed(str(store), run, wanted, combine or "logits", weights, chosen)
    else:
        if weights is not None or members is not None:
            raise MismatchError(
                f"{store}: expected a store that keeps its members, found {len(run.members)} combined by rule "
                f"{run.combine.rule!r}; only its temperature can be changed; generate with --combine keep"
            )
        new = _retempered(str(store), run, wanted, combine)
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
    """How rows of a store become those of `new`, which combines its members or has another temperature.

    chosen: positions of the combined members; None: found by what they are.
    """
    run = samples.stores[0].run
    wanted = new.temperature
    measured: Truth = "measured" if run.encoding.name == "float32" and samples.measured else "unknown"
    if run.kept:
        mixed = _positions(run.members, new.members) if chosen is None else chosen

        def average(rows: StoredRows, meter: FidelityMeter) -> dict[str, Array]:
            scaled_BMC = torch.from_numpy(_scaled_at(rows, wanted))
            # They are divided by the temperature already.
            mixed_BC = combine(
                [scaled_BMC[:, m] for m in mixed], rule=new.combine.rule, temperature=1.0, weights=new.combine.weights
            )
            return encoded(mixed_BC, rows, new, meter)

        return average, measured
    if run.encoding.name == "head":
        return keep_columns, "unknown"  # it holds the logits before any temperature
    if run.encoding.name == "topk":
        ratio = np.float32(run.temperature / wanted)

        def rescale(rows: StoredRows, meter: FidelityMeter) -> dict[str, Array]:
            return {**rows.columns, "value": _half(rows.columns["value"].astype(np.float32) * ratio)}

        return rescale, "unknown"

    def retemper(rows: StoredRows, meter: FidelityMeter) -> dict[str, Array]:
        return encoded(torch.from_numpy(_scaled_at(rows, wanted)), rows, new, meter)

    return retemper, measured


def _positions(members: Sequence[Member], chosen: Sequence[Member]) -> list[int]:
    """Where each of the chosen members stands, of equal ones each once."""
    found: list[int] = []
    for one in chosen:
        found.append(next(place for place, member in enumerate(members) if member == one and place not in found))
    return found


def _mixed(
    store: str,
    run: Run,
    wanted: float,
    rule: str,
    weights: Sequence[float] | None,
    chosen: Sequence[int],
) -> Run:
    shares = normalized_weights(weights, len(chosen))
    encoding = run.encoding
    if encoding.name == "sampled":
        raise MismatchError(
            f"{store}: its members are random draws of each teacher's softmax, which cannot be combined into draws of "
            "their average; keep the members in another encoding"
        )
    if encoding.name == "topk":
        _declared(store, run, wanted)
        encoding = dataclasses.replace(
            encoding, temperatures=(wanted,)
        )  # of the combination, the tail is known here only
    return dataclasses.replace(
        run,
        temperature=wanted,
        combine=Combine(rule=rule, weights=shares),
        members=tuple(run.members[number] for number in chosen),
        encoding=encoding,
    )


def _retempered(store: str, run: Run, wanted: float, rule: str | None) -> Run:
    if rule is not None and rule != run.combine.rule and len(run.members) > 1:
        raise MismatchError(
            f"{store}: was combined by rule {run.combine.rule!r} and keeps no members, found rule {rule!r}; "
            "generate with --combine keep to choose later"
        )
    if wanted == run.temperature:
        raise UsageError(f"{store}: keeps no members and is at temperature {wanted:g} already; nothing to do")
    if not retemperable(run.combine.rule, len(run.members)):
        raise MismatchError(
            f"{store}: is the mean of {len(run.members)} teachers' probabilities at temperature {run.temperature:g}, "
            f"which cannot be changed exactly to {wanted:g}; use a store that keeps its members"
        )
    if run.encoding.name == "topk":
        _declared(store, run, wanted)
    if run.encoding.name == "sampled":
        raise MismatchError(
            f"{store}: holds random draws from the softmax at temperature {run.temperature:g}, which say nothing "
            f"exact at {wanted:g}; generate at that temperature, or in another encoding"
        )
    return dataclasses.replace(run, temperature=wanted)


def _scaled_at(rows: StoredRows, wanted: float) -> Array:
    """float32 scaled logits at another temperature: (B, C), or (B, M, C). For top-k it must be a declared one."""
    run = rows.run
    ratio = np.float32(run.temperature / wanted)
    if run.encoding.name != "topk":
        return rows.scaled_logits * ratio if ratio != 1 else rows.scaled_logits
    columns = {**rows.columns, "value": rows.columns["value"].astype(np.float32) * ratio}
    return decode(
        run.encoding,
        columns,
        num_classes=run.num_classes,
        temperature=wanted,
        members=run.members_stored,
        kept=run.kept,
    )


def _half(values: Array) -> Array:
    # A finite value stays finite: -inf means a masked class.
    return np.where(np.isneginf(values), values, np.maximum(values, LOWEST_HALF)).astype(np.float16)


def _declared(store: str, run: Run, wanted: float) -> None:
    if wanted not in run.encoding.temperatures:
        known = ", ".join(f"{t:g}" for t in run.encoding.temperatures)
        raise MismatchError(
            f"{store}: knows the mass outside its top {run.encoding.k} at temperatures {known}, found {wanted:g}; "
            "choose one of these, or generate with it among them"
        )


def _chosen(store: str, members: Sequence[Member], asked: Sequence[int | str] | None) -> list[int]:
    if asked is None:
        return list(range(len(members)))
    chosen = [_member(store, members, one) for one in asked]
    if not chosen or len(set(chosen)) != len(chosen):
        raise UsageError(f"members: expected one or more, each once, found {list(asked)}")
    return chosen


def _member(store: str, members: Sequence[Member], one: int | str) -> int:
    """Position from 0 of a member given by its number from 1 or by its SPEC."""
    listed = ", ".join(f"{number} {member.spec}" for number, member in enumerate(members, 1))
    if isinstance(one, int) or one.isdecimal():
        if 1 <= int(one) <= len(members):
            return int(one) - 1
        raise UsageError(f"members: {store} has {listed}; found {one}; give one of these numbers or SPECs")
    found = [position for position, member in enumerate(members) if member.spec == one]
    if len(found) != 1:
        which = "several of them" if found else "none of them"
        raise UsageError(f"members: {store} has {listed}; {one!r} is {which}; give a number")
    return found[0]
