"""Commands that make stores and files from stores: combine, merge, convert, export."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from softlabel.cli.encoding_options import EncodingOptions
    from softlabel.convert import RewriteSummary
    from softlabel.store.fidelity import Fidelity
    from softlabel.store.manifest import Manifest


def combine(
    store: str,
    out: str,
    /,
    *,
    weights: list[float] | None = None,
    members: list[str] | None = None,
    combine: Literal["logits", "probs"] | None = None,
    temperature: float | None = None,
) -> int:
    """Combine the members of a store that keeps them, or change its temperature, without running a teacher.

    A store that does not keep members can only change its temperature, if that is exact. The same command resumes an
    interrupted one.

    Example:
        softlabel combine labels/three labels/mixed --weights 0.5 0.3 0.2 --combine probs --temperature 2

    Args:
        store: folder of the store.
        out: folder of the new one.
        weights: one number per chosen member, normalised to sum 1; equal when absent.
        members: numbers (from 1, as in inspect) or SPECs of the members to combine; all when absent.
        combine: mean of the logits (when absent), or of the softmax at the temperature.
        temperature: of the new store; the store's when absent.
    """
    options = dict(locals())
    from softlabel.convert import combine_store

    return _print_summary(
        combine_store(
            store, out, weights=weights, members=members, combine=combine, temperature=temperature, options=options
        )
    )


def merge(stores: list[str], /, *, out: str) -> int:
    """Merge stores with different samples and equal teachers and settings.

    The same command resumes an interrupted one.

    Example:
        softlabel merge labels/part1 labels/part2 --out labels/all

    Args:
        stores: folders of the stores, in the order of their samples.
        out: folder of the new one.
    """
    options = dict(locals())
    from softlabel.convert import merge_stores

    return _print_summary(merge_stores(stores, out, options=options))


def convert(
    store: str,
    out: str,
    /,
    *,
    format: Literal["parquet", "hdf5"] | None = None,
    how: "EncodingOptions",
    shard_rows: int | None = None,
) -> int:
    """Write a store's labels in another file format, encoding or shard size.

    A finer encoding does not restore what was lost. The same command resumes an interrupted one.

    Example:
        softlabel convert labels/resnet50 labels/small --encoding topk --top-k 32

    Args:
        store: folder of the store.
        out: folder of the new one.
        format: file format of the shards; the same when absent.
        shard_rows: samples per shard; the same when absent.
    """
    from softlabel.convert import convert_store
    from softlabel.store.open import open_store

    options = {"store": store, "out": out, "format": format, **asdict(how), "shard_rows": shard_rows}
    encoding = how.encoding_at(open_store(store, verify="sizes").run.temperature)
    done = convert_store(store, out, format=format, encoding=encoding, shard_rows=shard_rows, options=options)
    return _print_summary(done)


def export(store: str, out: str, /, *, to: Literal["hf", "npz", "distillkit", "axolotl"]) -> int:
    """Write a store as Parquet with plain columns for any tool (hf), or as NumPy arrays (npz).

    pandas, polars, DuckDB and Hugging Face datasets read the Parquet files. Stores of tokens in encoding topk are
    written for DistillKit and axolotl, too, as log-probabilities at temperature 1.

    Example:
        softlabel export labels/resnet50 exported --to hf

    Args:
        store: folder of the store.
        out: a folder, for npz a file name that ends in .npz.
        to: a folder of Parquet files, one file of NumPy arrays, or a data set for a trainer of language models.
    """
    options = dict(locals())
    from softlabel.convert import export_store

    done = export_store(store, out, to=to, options=options)
    if not done.files_written:
        print(f"{done.path}: already exported, {done.total_rows:,} rows; nothing to do")
    else:
        print(f"{done.path}: {done.total_rows:,} rows, {done.bytes:,} bytes, in {done.seconds:.1f} s")
    if done.left_out:
        print(
            f"  {done.left_out:,} of them left out: their text has other tokens than the store, or no position of them "
            "counts"
        )
    return 0


def _print_summary(summary: "RewriteSummary") -> int:
    if not summary.shards_written:
        print(f"{summary.path}: already complete, {summary.total_rows:,} rows; nothing to do")
        return 0
    print(f"{summary.path}: complete, {summary.total_rows:,} rows, {summary.bytes:,} bytes, in {summary.seconds:.1f} s")
    if summary.step is not None:
        print(f"  cost of the new encoding: {format_nats(summary.step)}")
    if summary.total_bad:
        print(f"  {summary.total_bad:,} bad samples have no row; 'softlabel inspect {summary.path}' lists them")
    return 0


def format_nats(cost: "Fidelity") -> str:
    """Return the loss of an encoding as text."""
    return (
        f"KL in nats at T = 1: mean {cost.mean_t1:.1e}, worst {cost.worst_t1:.1e}; "
        f"at the store's T: mean {cost.mean_t:.1e}, worst {cost.worst_t:.1e}"
    )


def describe_provenance(manifest: "Manifest") -> list[tuple[str, str]]:
    """Return lines for `inspect` about a store made from others: its sources and cost."""
    made = manifest.recorded.get("derived")
    if not isinstance(made, Mapping):
        return []
    sources = [one for one in made.get("sources") or () if isinstance(one, Mapping)]
    lines = [("made by", f"softlabel {made.get('command')} from {', '.join(str(one.get('path')) for one in sources)}")]
    if manifest.totals.fidelity is None and manifest.totals.rows:
        through = ", ".join(dict.fromkeys(_list_encodings(made)))
        lines.append(("cost", f"against the teacher unknown: the labels came through {through}"))
        step = made.get("step")
        if isinstance(step, Mapping):
            lines.append(
                (
                    "",
                    f"this step: KL(source || stored) in nats at T = {manifest.run.temperature:g}: mean "
                    f"{step.get('mean_t'):.1e}, worst {step.get('worst_t'):.1e}, on {step.get('rows'):,} rows",
                )
            )
    return lines


def _list_encodings(made: object) -> list[str]:
    """Return the encodings of the sources of a derived store, the first one first."""
    if not isinstance(made, Mapping):
        return []
    found: list[str] = []
    for one in made.get("sources") or ():
        if isinstance(one, Mapping):
            encoding = one.get("encoding")
            found += [
                *_list_encodings(one.get("derived")),
                str(encoding.get("name") if isinstance(encoding, Mapping) else "?"),
            ]
    return found
