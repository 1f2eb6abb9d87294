"""Commands about one store: inspect, verify, repair, extend, report."""

from typing import TYPE_CHECKING, Literal

from softlabel.cli.config import options_of, require_local
from softlabel.cli.report import describe_features, print_summary, size
from softlabel.common.plain_text import show_plainly
from softlabel.errors import UsageError

if TYPE_CHECKING:
    from softlabel.store.reader import Store

DAMAGED = 3  # exit code of `verify`, and of `report` where a condition is true
BAD_SHOWN = 10


def inspect(store: str, /, *, json: bool = False, options: bool = False) -> int:
    """Show the content of a store: teachers, temperature, encoding and its cost, rows, bad samples.

    Also works on an unfinished store.

    Example:
        softlabel inspect labels/resnet50

    Args:
        store: folder of the store.
        json: print the manifest as JSON.
        options: print the options that it was made with as YAML for --config.
    """
    import dataclasses
    from json import dumps

    from softlabel.cli.convert import describe_provenance
    from softlabel.store.open import open_store
    from softlabel.store.strict_json import to_json

    opened = open_store(store, verify="sizes", allow_incomplete=True)
    manifest = opened.manifest
    if options:
        print(options_of(opened.path, manifest), end="")
        return 0
    if json:
        found = dataclasses.asdict(manifest)
        found["run"]["encoding"] = to_json(manifest.run.encoding)
        for name in ("tokens", "features", "compression"):  # left out where there is none, as in the manifest
            if found["run"][name] in (None, "none"):
                del found["run"][name]
        print(dumps(found, indent=2))
        return 0
    run, totals = manifest.run, manifest.totals
    state = "complete" if manifest.complete else f"NOT COMPLETE, {totals.shards} of {run.shard_count} shards"
    of_row = run.label_columns if run.tokens is not None else (*run.label_columns, *run.sample_columns)
    per_row = sum(column.row_bytes for column in of_row)
    samples, answer, hard = "samples", "row", "no hard labels"
    if run.tokens is not None:
        samples, answer, hard = "documents", "labelled position", "the next tokens"
    lines = [
        ("store", f"{opened.path}  ({state})"),
        (
            "rows",
            f"{totals.rows:,} of {run.dataset.rows:,} {samples} x {run.views.count} view(s), {totals.shards} shards",
        ),
        ("size", f"{totals.bytes:,} bytes in {run.format} files"),
        ("data", f"{manifest.recorded.get('data', '?')}  ({run.dataset.kind}, fingerprint {run.dataset.fingerprint})"),
        *_describe_tokens(opened),
        ("labels", "hard labels stored" if run.dataset.has_labels else hard),
        *([("classes", _format_classes(run.num_classes, run.class_names))] if run.num_classes else []),
        ("encoding", f"{run.encoding.name}, {per_row:,} bytes a {answer}"),
        *([("combine", f"{run.combine.rule} at temperature {run.temperature:g}")] if run.num_classes else []),
        *describe_features(run),
        *([("activation", "sigmoid, of each class by itself")] if run.activation == "sigmoid" else []),
        *([("views", f"{run.views.policy['name']}, seed {run.views.seed}")] if run.view_columns else []),
    ]
    if (cost := totals.fidelity) is not None:
        at = [(1.0, cost.mean_t1, cost.worst_t1), (run.temperature, cost.mean_t, cost.worst_t)]
        costs = "; ".join(f"T = {t:g}: mean {mean:.1e}, worst {worst:.1e}" for t, mean, worst in dict.fromkeys(at))
        lines.append(("cost", f"KL(teacher || stored) in nats at {costs}"))
    if isinstance(folds := manifest.recorded.get("crossfit"), int):
        lines.append(("crossfit", f"{folds} folds; each was labelled by a teacher that was trained on the others"))
    lines += describe_provenance(manifest)
    weights = run.combine.weights or (1.0,) * len(run.members)
    for number, (member, weight) in enumerate(zip(run.members, weights, strict=True), 1):
        own = f", logits divided by {member.calibration:.4g}" if member.calibration != 1.0 else ""
        lines.append((f"teacher {number}", f"{member.spec}  weight {weight:.3g}, {member.precision}{own}"))
        lines.append(("", f"weights sha256 {member.sha256}"))
        if number <= len(optimized := manifest.recorded.get("optimized") or []):
            engine, rows = optimized[number - 1].get("engine"), optimized[number - 1].get("rows")
            lines.append(("", f"computed {engine}" + (f", {rows} samples a pass" if rows else "")))
        lines.append(("", ", ".join(f"{name} {value}" for name, value in member.preprocessing.items())))
    for key, reason in list(opened.bad.items())[:BAD_SHOWN]:
        lines.append(("bad sample", f"{key}: {reason}"))
    if len(opened.bad) > BAD_SHOWN:
        lines.append(("", f"and {len(opened.bad) - BAD_SHOWN:,} more; --json lists every one"))
    print("\n".join(f"{name:<11}{show_plainly(text)}" for name, text in lines))
    return 0


def _describe_tokens(store: "Store") -> list[tuple[str, str]]:
    """Return lines about the tokens of a store of tokens; none for another store."""
    from softlabel.store.token_totals import count_tokens

    if (tokens := store.run.tokens) is None:
        return []
    found = count_tokens(store)
    about = "" if found.exact else "about "
    mean = found.tokens / max(1, len(store))
    each = store.manifest.totals.bytes / max(1, found.tokens)
    ends = [f"{name} {id}" for name, id in (("bos", tokens.bos), ("eos", tokens.eos)) if id is not None]
    content = store.tokenizer
    kept = "its tokenizer.json is not in the store" if content is None else f"tokenizer.json of {len(content):,} bytes"
    lines = [
        ("tokens", f"{about}{found.tokens:,}, {found.positions:,} positions labelled ({tokens.positions})"),
        ("", f"{mean:,.1f} tokens a document, at most {tokens.max_length:,}; {each:,.1f} bytes a token"),
        ("tokenizer", ", ".join([f"sha256 {tokens.tokenizer}", *ends, kept])),
    ]
    return lines if tokens.template is None else [*lines, ("", f"chat template sha256 {tokens.template}")]


def verify(
    store: str,
    /,
    *,
    recompute: int = 0,
    data: str | None = None,
    teacher: list[str] | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> int:
    """Check every byte of a store: file hashes, rows, keys, ranges, finite values, manifest.

    Exit code 0 means intact; 3 means damaged, different from --data, or that no image of --data could be compared.

    Example:
        softlabel verify labels/resnet50

    Args:
        store: folder of the store.
        recompute: run the teachers again on this many rows and report how much the stored labels differ.
        data: check that the store covers this SOURCE, and the content hashes of its images.
        teacher: the SPECs for --recompute, if the weights moved.
        threads: number of threads; one per core when absent.
        device: auto, cpu, cuda or cuda:N.
    """
    import time

    from tqdm import tqdm

    from softlabel.store.verify import verify_store

    if recompute < 0 or (threads is not None and threads < 1):
        raise UsageError("recompute and threads: expected at least 0 rows and 1 thread")
    started = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, desc="verifying", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify_store(store, threads=threads, progress=progress)
    seconds = time.perf_counter() - started
    if not report.ok:
        for problem in report.problems:
            print(f"damaged: {show_plainly(problem)}")
        print(f"{store}: DAMAGED, {len(report.problems)} problem(s) found")
        return DAMAGED
    print(f"{store}: whole. {report.rows:,} rows in {report.shards} shards, {report.bytes:,} bytes, {seconds:.1f} s")
    good = data is None or _print_coverage(store, data)
    if recompute:
        good = _print_recomputed(store, recompute, data, teacher, device) and good
    return 0 if good else DAMAGED


def _print_coverage(store: str, data: str) -> bool:
    from softlabel.maintain.coverage import coverage
    from softlabel.store.open import open_store

    found = coverage(open_store(store, verify="sizes"), data)
    print(f"  {found.samples:,} samples in {data}, {found.compared:,} of them compared by content")
    if found.unknown is not None:
        print(f"  {found.samples - found.missing_count - found.compared:,} cannot be compared: {found.unknown}")
    for count, keys, what in (
        (found.missing_count, found.missing, "samples have no row"),
        (found.surplus_count, (), "rows are of samples that the data do not have"),
        (found.changed_count, found.changed, "samples differ from the labelled ones"),
        (found.relabelled_count, found.relabelled, "samples have another hard label than in the store"),
    ):
        if count:
            print(f"  {count:,} {what}: {show_plainly(', '.join(keys))}" if keys else f"  {count:,} {what}")
    if found.ok and not found.compared:
        print(f"  nothing was compared: the samples of {data} may differ from the labelled ones")
        return False
    return found.ok


def _print_recomputed(store: str, rows: int, data: str | None, teachers: list[str] | None, device: str) -> bool:
    from dataclasses import replace

    from softlabel.generation.reload import config_of, reload_job
    from softlabel.maintain.audit import recompute, recompute_features
    from softlabel.store.open import open_store

    opened = open_store(store, verify="sizes")
    # As they were loaded: a graph of a teacher is compared with the teacher.
    config = replace(config_of(opened.manifest), device=device, optimize="none")
    one = opened.run.activation == "softmax"
    noun = "rows" if opened.run.tokens is None else "positions"
    differ, what = ("top-1 differs", noun) if one else ("answers change sides", "classes of all rows")
    answer = "class" if one else "answer"
    job = reload_job(opened.manifest, store, config, data=data, teachers=teachers)
    good = True
    if (features := recompute_features(opened, job, rows)) is not None:
        each = ", ".join(f"{name} by {difference:.1e}" for name, difference in features.differences.items())
        print(f"  {features.rows:,} rows recomputed: relative to its norm, {each} in the mean")
        if not (good := features.ok):
            print("  DIFFERENT: the teachers give other features, beyond rounding; have libraries or samples changed?")
    encoding = opened.run.encoding
    if not encoding.labels:
        return good
    found = recompute(opened, job, rows)
    kept = " of the kept classes" if encoding.sparse and not encoding.drawn else ""
    print(
        f"  {found.rows:,} {noun} recomputed: scaled logits{kept} differ by {found.mean_difference:.1e} in the mean, "
        f"{found.worst_difference:.1e} at worst; {differ} in {found.top1_disagreement:.4%} of the {what}"
    )
    if not found.ok:
        print(
            f"  DIFFERENT: the teachers give other labels, beyond encoding and rounding "
            f"({found.clearly_other:.2%} of the {what} have clearly another {answer}, {found.nats:.2g} nats "
            "apart); do their logits depend on the batch, or have libraries or samples changed?"
        )
    return found.ok and good


def repair(
    store: str,
    /,
    *,
    data: str | None = None,
    teacher: list[str] | None = None,
    source: list[str] | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Replace the missing or damaged shards of a store.

    The teachers label them; shards of a store that was combined, merged or converted are made from its sources. Refused
    if teachers, data or sources have changed.

    Example:
        softlabel repair labels/resnet50

    Args:
        store: folder of the store.
        data: the SOURCE, if it moved.
        teacher: the SPECs, if the weights moved.
        source: for a store made from others, their current paths in order, if they moved.
        workers: decoding processes; when absent, chosen for the machine.
        device: auto, cpu, cuda or cuda:N.
    """
    from softlabel.maintain.repair import repair as run

    if workers is not None and workers < 0:
        raise UsageError(f"workers: expected at least 0, found {workers}")
    summary = run(store, data=data, teachers=teacher, sources=source, workers=workers, device=device)
    if summary.shards_written or summary.problems:
        done = "made again from its sources" if summary.derived else "relabelled"
        print(f"{store}: {summary.shards_written} shards {done}, {summary.total_rows:,} rows, whole again")
    else:
        print(f"{store}: whole, {summary.total_rows:,} rows; nothing to repair")
    return 0


def extend(
    store: str,
    /,
    *,
    teacher: str,
    data: str | None = None,
    calibration: str | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Add a member to a store that keeps its members (--combine keep); the others are not run again.

    Example:
        softlabel extend labels/ensemble --teacher torchvision:resnet50@resnet50.pth

    Args:
        store: folder of the store.
        teacher: SPEC of the new member.
        data: the SOURCE, if it moved.
        calibration: file of 'softlabel calibrate' with this teacher, if the other members are calibrated.
        workers: decoding processes; when absent, chosen for the machine.
        device: auto, cpu, cuda or cuda:N.
    """
    from softlabel.maintain.extend import extend as run

    print_summary(run(store, teacher=teacher, data=data, calibration=calibration, workers=workers, device=device))
    return 0


def _format_classes(count: int, names: tuple[str, ...] | None) -> str:
    if names is None:
        return f"{count:,}"
    shown = ", ".join(names[:10])
    return f"{count:,}: {shown}{', ...' if count > 10 else ''}"


def report(
    store: str,
    /,
    *,
    data: str | None = None,
    runs: list[str] | None = None,
    eval_data: str | None = None,
    eval_labels: str | None = None,
    out: str = "report.html",
    json: str | None = None,
    noise_csv: str | None = None,
    fail_if: list[str] | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "auto",
    workers: int = 0,
) -> int:
    """Show what the labels of a store, and the students trained on them, are worth: one HTML file.

    How good the labels are, which hard labels look wrong, calibration, sharpness, confusion, members and views against
    each other, duplicates, students against their teacher; with pictures of the samples. The file needs no network and
    no server.

    Example:
        softlabel report labels/cifar10 --data train.parquet --runs runs/kd --eval-data test.parquet

    Args:
        store: folder of the store; or the folder of one or several runs, for a report of them alone.
        data: the SOURCE that was labelled; when absent, the one that the store records.
        runs: folders of runs, whose students are compared with the teacher.
        eval_data: a SOURCE that the students were not trained on.
        eval_labels: a store of the teacher's labels of --eval-data.
        out: the HTML file.
        json: a file for all figures as JSON.
        noise_csv: a file for all hard labels that are likely wrong, the most likely one first.
        fail_if: end with exit code 3 if a condition is true, such as 'noise>0.05' or 'duplicates>0'; an unknown metric
            lists those that there are.
        batch_size: samples per forward pass of the students; of language models 32 tokens stand for one.
        precision: of the students.
        device: auto, cpu, cuda or cuda:N.
        workers: decoding processes.
    """
    from softlabel.report.report import DocumentReport
    from softlabel.report.write import write_report

    for path, option in ((out, "--out"), (json, "--json"), (noise_csv, "--noise-csv")):
        if path is not None:
            require_local(path, option)
    found = write_report(
        store,
        data=data,
        runs=runs or (),
        eval_data=eval_data,
        eval_labels=eval_labels,
        out=out,
        json=json,
        noise_csv=noise_csv,
        fail_if=fail_if or (),
        batch_size=batch_size,
        precision=precision,
        device=device,
        workers=workers,
    )
    for sentence in found.report.summary:
        print(f"{sentence.level:<5} {show_plainly(sentence.text)}")
    for note in getattr(found.report.students, "notes", ()):
        print(f"note  {show_plainly(note)}")
    assert found.path is not None
    what = "texts of {:,} documents" if isinstance(found.report, DocumentReport) else "pictures of {:,} samples"
    print(f"{found.path}: {size(found.path.stat().st_size)}, {what.format(found.pictures)}")
    for failure in found.failures:
        print(f"failed: {failure}")
    return DAMAGED if found.failures else 0
