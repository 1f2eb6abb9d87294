"""Everything that a CUDA device can show, in one command: python -m tests.gpu [--out DIR] [--minutes 7] [--dry-run]

All benchmarks of a CUDA device, the short ones first, then the tests marked `gpu` and those of the loss's kernels. Each
part has a time budget, so that seven minutes give every figure, and the whole never runs past --minutes; what did not
fit is listed. `--only tests kernels` gives all of that time to the tests. The table comes last; figures as JSON and a
log of each part lie under --out.

Runs from a source tree, without git or a network. Packages that the machine lacks are installed, for this run alone,
from the wheels in `.gpu-wheels/`, which `make gpu-wheels` fills on a machine with a package index.

--dry-run runs the same code on the CPU, with tiny sizes and Triton's interpreter. It measures nothing, and lists by
name what only a CUDA device can run.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.benchmarks.figures import Figure, read_figures

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".gpu-wheels"
_GRACE = 5.0  # seconds between a part's own deadline and its end
_SHORTEST = 8.0  # a part is not begun with less


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process of the run.

    Attributes:
        name: of the part and of its log.
        command: what runs, behind `python -m`; a benchmark takes --seconds and --dry-run too.
        seconds: its budget.
    """

    name: str
    command: tuple[str, ...]
    seconds: float

    @property
    def is_benchmark(self) -> bool:
        return self.command[0] != "pytest"


def _pytest(name: str, *paths: str, marks: str, seconds: float) -> Part:
    chosen = (
        "-v",  # a line a test, which says what had been run of a part that was stopped
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--strict-markers",
        "-W",
        "ignore",
        "--timeout",
        "120",
        "-n",
        "4",
    )
    return Part(name=name, command=("pytest", *paths, *chosen, "-m", marks), seconds=seconds)


def _benchmark(name: str, seconds: float) -> Part:
    return Part(name=name, command=(f"tests.benchmarks.{name}",), seconds=seconds)


# Figures come first, and of those what takes the shortest; what a part leaves of its budget is there for the last ones.
PARTS = (
    _benchmark("bench_limits_gpu", 20),
    _benchmark("bench_linear_loss_gpu", 25),
    _benchmark("bench_decode_gpu", 25),
    _benchmark("bench_stacked_gpu", 40),
    _benchmark("bench_student_gpu", 60),
    _benchmark("bench_loss_gpu", 50),
    _benchmark("bench_generate_gpu", 90),
    _benchmark("bench_compile_gpu", 100),
    _pytest("tests", "tests/gpu", marks="gpu", seconds=150),
    _pytest("kernels", "tests/loss/triton_interpreter.py", marks="not slow", seconds=90),
)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a part.

    Attributes:
        state: done, failed, stopped (its time was up) or left out (no time was left to begin it).
        passed: tests that passed.
        failed: names of tests that failed, with the first line of the reason.
        skipped: names of tests that were skipped, with the reason.
        figures: what a benchmark reported before it ended.
    """

    name: str
    state: str
    seconds: float = 0.0
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def environment(dry_run: bool) -> dict[str, str]:
    """The environment of the parts, with the wheels of `.gpu-wheels/` installed into a folder of this run."""
    paths = [str(ROOT)]
    wheels = sorted(WHEELS.glob("*.whl"))
    if wheels and not dry_run:
        target = tempfile.mkdtemp(prefix="softlabel-wheels-")
        install = ("pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", target)
        subprocess.run([sys.executable, "-m", *install, *map(str, wheels)], check=True)
        paths.append(target)
    given = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    given["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    if dry_run:
        given |= {"SOFTLABEL_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        given.setdefault("OMP_NUM_THREADS", "2")
    return given


def run_part(part: Part, out: Path, given: dict[str, str], seconds: float, dry_run: bool) -> Outcome:
    """Run a part for at most this long."""
    figures, report = out / f"{part.name}.jsonl", out / f"{part.name}.xml"
    command = [sys.executable, "-m", *part.command]
    if part.is_benchmark:
        command += ["--seconds", f"{max(1.0, seconds - _GRACE):.0f}", *(["--dry-run"] if dry_run else [])]
    else:
        command += [f"--junitxml={report}"]
        if dry_run and part.name == "kernels":  # `make test` runs all of them in the interpreter
            command += ["-k", "registered or impossible"]
    started = time.monotonic()
    with (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**given, "SOFTLABEL_FIGURES": str(figures)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "done" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "stopped"
            os.killpg(process.pid, 9)
            process.wait()
    outcome = Outcome(name=part.name, state=state, seconds=time.monotonic() - started, figures=read_figures(figures))
    if report.exists():
        _read_report(report, outcome)
    elif not part.is_benchmark:
        _read_log(out / f"{part.name}.log", outcome)
    return outcome


def _read_report(path: Path, outcome: Outcome) -> None:
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if (skipped := case.find("skipped")) is not None:
            outcome.skipped.append(f"{name}: {skipped.get('message')}")
        elif (wrong := case.find("failure")) is not None or (wrong := case.find("error")) is not None:
            outcome.failed.append(f"{name}: {' '.join((wrong.get('message') or '').split())[:200]}")
        else:
            outcome.passed += 1


def _read_log(path: Path, outcome: Outcome) -> None:
    """What pytest had printed before it was stopped, which writes its report at the end."""
    for state, name in re.findall(r"^.*\b(PASSED|FAILED|ERROR|SKIPPED) (\S+::.*?)\s*$", path.read_text(), re.MULTILINE):
        if state == "PASSED":
            outcome.passed += 1
        else:
            (outcome.skipped if state == "SKIPPED" else outcome.failed).append(name)


def print_table(outcomes: Sequence[Outcome], dry_run: bool) -> None:
    """What failed and what was left out, then the figures."""
    print("\n== tests")
    for outcome in outcomes:
        if outcome.passed or outcome.failed or outcome.skipped:
            counts = f"{outcome.passed} passed, {len(outcome.failed)} failed, {len(outcome.skipped)} skipped"
            print(f"{outcome.name}: {counts} ({outcome.seconds:.0f} s, {outcome.state})")
            for line in outcome.failed:
                print(f"  FAILED {line}")
    if dry_run:
        print("\n== only a CUDA device can run")
        for line in [line for outcome in outcomes for line in outcome.skipped]:
            print(f"  {line}")
        for name in only_on_cuda(outcomes):
            print(f"  figure: {name}")
    print("\n== figures")
    for outcome in outcomes:
        for figure in outcome.figures:
            print(figure.line())
    short = [outcome for outcome in outcomes if outcome.state != "done"]
    if short:
        print("\n== not whole")
        for outcome in short:
            print(f"  {outcome.name}: {outcome.state} after {outcome.seconds:.0f} s, see {outcome.name}.log")


def only_on_cuda(outcomes: Sequence[Outcome]) -> list[str]:
    """The figures that the benchmarks name and a dry run did not report."""
    reported = {figure.name for outcome in outcomes for figure in outcome.figures}
    listed: list[str] = []
    for part in PARTS:
        if part.is_benchmark:
            module = __import__(part.command[0], fromlist=["FIGURES"])
            listed += [name for name in module.FIGURES if name not in reported]
    return listed


def describe_machine() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "cores": str(os.cpu_count())}
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the logs and figures.json")
    parser.add_argument("--minutes", type=float, default=7.0, help="the whole run takes no longer")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes: measures nothing")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", metavar="PART", choices=names, help=f"of {', '.join(names)}")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if options.only is None or part.name in options.only]
    for part in chosen:
        for old in (out / f"{part.name}.jsonl", out / f"{part.name}.xml"):
            old.unlink(missing_ok=True)
    given = environment(options.dry_run)
    outcomes = []
    for part in chosen:
        left = deadline - time.monotonic()
        if left < _SHORTEST:
            outcomes.append(Outcome(name=part.name, state="left out"))
            continue
        outcomes.append(
            run_part(part, out, given, min(part.seconds, left) if not options.dry_run else left, options.dry_run)
        )
        print(f"{part.name}: {outcomes[-1].state} in {outcomes[-1].seconds:.0f} s", flush=True)
    machine = describe_machine()
    (out / "figures.json").write_text(
        json.dumps({"machine": machine, "parts": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n"
    )
    print_table(outcomes, options.dry_run)
    print(f"\n{', '.join(f'{name} {value}' for name, value in machine.items())}")
    failed = any(outcome.failed or outcome.state == "failed" for outcome in outcomes)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
