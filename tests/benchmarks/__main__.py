"""`make bench`: every benchmark in turn. Each prints its own ratios; RESULTS.md keeps them."""

import subprocess
import sys
from pathlib import Path


def main() -> None:
    scripts = sorted(Path(__file__).parent.glob("bench_*.py"))
    failed = []
    for script in scripts:
        print(f"\n== {script.stem}", flush=True)
        if subprocess.run([sys.executable, "-m", f"tests.benchmarks.{script.stem}"], check=False).returncode:
            failed.append(script.stem)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
