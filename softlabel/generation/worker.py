"""Label and publish one shard, on a worker of a cluster or in a separate process.

    Request -> the store's manifest -> Job (loaded once per process) -> label_shard -> write_shard -> Outcome

Only paths and records are exchanged, never arrays, models or images. Labelling is idempotent and shards are named by
their content, so a shard may run twice, late, or concurrently.

    python -m softlabel.generation.worker REQUEST NUMBER KEYS [SECONDS]   prints the outcome
"""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from softlabel.common.device import Choice
from softlabel.errors import DataError, MismatchError, SoftLabelError, StoreError, one_line
from softlabel.generation.config import BadImagePolicy, GenerateConfig
from softlabel.generation.job import Job
from softlabel.generation.malloc import keep_freed_memory
from softlabel.generation.pipeline import label_shard
from softlabel.generation.reload import config_of, reload_job
from softlabel.store.manifest import Manifest, ShardRecord
from softlabel.store.manifest_read import load_root
from softlabel.store.storage.open import open_folder
from softlabel.store.strict_json import dumps, from_json, loads, to_json
from softlabel.store.writer import write_shard

HUNG = 86  # exit status of a process whose shard took too long
LOADING_SECONDS = 3600.0  # for data and teachers, before the first shard
_MARGIN_SECONDS = 60.0  # for a process to start and end


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a worker needs beside the manifest to label shards of a store.

    Attributes:
        session: a unique name per run of a client. A worker loads data and teachers once per session: both may change
            under the same names.
        out: the store's folder or URL, as every worker reaches it.
        run: fingerprint of the run.
        data: the SOURCE, as every worker reaches it.
        teachers: SPECs.
        device: of the teachers.
        on_bad_image: whether an image that cannot be decoded is skipped, or stops the run.
        threads, members_in_turn: of `Tuning`; the manifest has the other choices.
    """

    session: str
    out: str
    run: str
    data: str
    teachers: tuple[str, ...]
    device: str = "auto"
    on_bad_image: BadImagePolicy = "skip"
    threads: int | None = None
    members_in_turn: Choice = "auto"

    def config(self, manifest: Manifest) -> GenerateConfig:
        """Return the configuration of this worker's job."""
        return dataclasses.replace(
            config_of(manifest),
            device=self.device,
            on_bad_image=self.on_bad_image,
            threads=self.threads,
            members_in_turn=self.members_in_turn,
            workers=0,  # Dask's processes cannot have children: threads decode
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one shard: its record, or an error.

    Attributes:
        number: of the shard.
        record: None after an error.
        error: one line.
        transient: whether a retry may help (storage), not for wrong data or teachers.
        died: whether the shard killed a separate process.
        fatal: whether the whole run must stop.
        correct, labelled: images whose top class is the hard label, and images with a hard label.
        truncated: rows of samples longer than a teacher takes.
        seconds: duration.
        worker: address of the worker.
    """

    number: int
    record: ShardRecord | None = None
    error: str = ""
    transient: bool = False
    died: bool = False
    fatal: bool = False
    correct: int = 0
    labelled: int = 0
    truncated: int = 0
    seconds: float = 0.0
    worker: str = ""


class _JobCache:
    """The job that this process has loaded, for all shards of a run."""

    def __init__(self) -> None:
        self._loaded: tuple[Request, Job] | None = None
        # One shard at a time per process: the device's memory is planned for one batch.
        self.turn = threading.Lock()

    def job(self, request: Request) -> Job:
        if self._loaded is None or self._loaded[0] != request:
            self._loaded = None  # frees the memory of another run's teachers
            keep_freed_memory()
            manifest = load_root(open_folder(request.out))
            if (found := manifest.run.fingerprint()) != request.run:
                raise MismatchError(f"{request.out}: expected run {request.run}, found {found}; rerun the command")
            job = reload_job(
                manifest,
                request.out,
                request.config(manifest),
                data=request.data,
                teachers=request.teachers,
                trust_keys=True,  # a worker checks only the keys of its shards
            )
            self._loaded = request, job
        return self._loaded[1]


_JOBS = _JobCache()


def label_one(request: Request, number: int, keys: str, seconds: float, worker: str = "") -> Outcome:
    """Label and publish one shard; errors of data, teachers and storage are in the outcome.

    Args:
        request: of the run.
        number: of the shard.
        keys: expected `Source.digest` of the shard's samples.
        seconds: timeout, without loading, after which this process ends; 0: none.
        worker: name for the outcome.
    """
    job = None
    with _JOBS.turn:
        started = time.monotonic()
        try:
            with _watchdog(LOADING_SECONDS if seconds else 0.0, number):
                job = _JOBS.job(request)
            started = time.monotonic()
            with _watchdog(seconds, number):
                return _label_and_write(job, request, number, keys, started, worker)
        except (SoftLabelError, OSError, MemoryError) as error:
            transient = isinstance(error, StoreError | OSError | MemoryError)
            stops = request.on_bad_image == "error" and isinstance(error, DataError)
            return Outcome(
                number=number,
                error=one_line(error, limit=None),
                transient=transient,
                # A worker that cannot load the job would fail all shards, faster than others label them.
                fatal=stops or isinstance(error, MismatchError) or (job is None and not transient),
                seconds=time.monotonic() - started,
                worker=worker,
            )


def _label_and_write(job: Job, request: Request, number: int, keys: str, started: float, worker: str) -> Outcome:
    plan = job.run.shard(number)
    if job.labeller.source.digest(plan.start, plan.stop) != keys:
        raise MismatchError(
            f"{request.data}: the keys of samples {plan.start} to {plan.stop - 1} differ from those where the run "
            "began; give every worker the same data"
        )
    shard = label_shard(plan, job.labeller)
    record = write_shard(request.out, job.run, plan, shard.rows, shard.bad, fidelity=shard.fidelity)
    return Outcome(
        number=number,
        record=record,
        correct=shard.correct,
        labelled=shard.labelled,
        truncated=shard.truncated,
        seconds=time.monotonic() - started,
        worker=worker,
    )


@contextmanager
def _watchdog(seconds: float, number: int) -> Iterator[None]:
    """End the process if a shard takes longer: with a hung device it sends heartbeats and cannot be interrupted."""
    if seconds <= 0:
        yield
        return

    def end() -> None:
        print(f"softlabel: shard {number} took longer than {seconds:g} s; ending its process", file=sys.stderr)
        sys.stderr.flush()
        os._exit(HUNG)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main() -> int:
    """Label the shard given on the command line; the last line of the output is the outcome as JSON."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    request = from_json(Request, json.loads(sys.argv[1]))
    seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    outcome = label_one(request, int(sys.argv[2]), sys.argv[3], seconds, worker=f"process {os.getpid()}")
    print(dumps(to_json(outcome)).decode())
    return 0


def label_alone(request: Request, number: int, keys: str, seconds: float, worker: str = "") -> Outcome:
    """Run `label_one` in a separate process, so that a shard that kills its process does not kill a worker.

    Returns:
        Its outcome, or one with the signal or status with which the process ended.
    """
    started = time.monotonic()
    asked = [dumps(to_json(request)).decode(), str(number), keys, str(seconds)]
    command = [sys.executable, "-m", "softlabel.generation.worker", *asked]
    # A process that hangs in native code may block its own watchdog.
    limit = LOADING_SECONDS + seconds + _MARGIN_SECONDS if seconds else None
    try:
        # The child can import the same modules, including uploaded ones.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ended = subprocess.run(command, capture_output=True, check=False, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        ended = subprocess.CompletedProcess(command, HUNG)
    if ended.returncode == 0 and (lines := ended.stdout.splitlines()):
        return dataclasses.replace(from_json(Outcome, loads(lines[-1])), worker=worker)
    if ended.returncode == HUNG:
        why = f"took longer than {seconds:g} s, also alone in a process"
    elif ended.returncode < 0:
        why = f"kills its process ({signal.Signals(-ended.returncode).name}), also alone"
    else:
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = f"its process ends with status {ended.returncode}, also alone: {' '.join(last)[:300]}"
    return Outcome(number=number, error=why, died=True, seconds=time.monotonic() - started, worker=worker)


if __name__ == "__main__":
    sys.exit(main())
