"""The start of the command line beside the import of torch: python -m tests.benchmarks.bench_start

CPU time of a process that parses a `generate` command and finds that its data are not there, less that of one that
imports torch, with compiled modules of Python in a cache of its own.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence


def measure_cpu(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    generate = ("generate", "--data", "missing.parquet", "--teacher", "zoo:resnet8", "--out", "unused")
    sides = {"torch": ("-c", "import torch"), "generate": ("-m", "softlabel", *generate)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for number in range(options.repeats + 1):  # the first one fills the cache
            for name, arguments in sides.items():
                found = measure_cpu((sys.executable, *arguments), environment)
                seconds[name] += [found] if number else []
    beyond = [whole - torch for whole, torch in zip(seconds["generate"], seconds["torch"], strict=True)]
    print(
        f"start of generate without the import of torch: {statistics.median(beyond):.2f} CPU seconds, least "
        f"{min(seconds['generate']) - min(seconds['torch']):.2f}   (goal: at most 0.5)"
    )


if __name__ == "__main__":
    main()
