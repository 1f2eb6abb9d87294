"""One shard, labelled and published anywhere: what a worker of a cluster runs, and a process of its own can.

    Request -> the store's manifest -> Job (loaded once a process) -> label_shard -> write_shard -> Outcome

No array, model or image leaves the process: a request names places, an outcome is the record of a published shard (or
why there is none). Labelling is idempotent and shards are named by their content, so it may run twice, late, or beside
itself. Nothing here knows what carries requests and outcomes.

    python -m softlabel.generation.worker REQUEST NUMBER KEYS [SECONDS]   prints the outcome, in a process of its own
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
_MARGIN_SECONDS = 60.0  # for a process to start and to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a worker must know, beside the manifest, to label shards of a store.

    Attributes:
        session: a word of its own for each client's run. A worker loads data and teachers once in it, and again in
            the next one: both may have changed under the same names.
        out: the store's folder or URL, as every worker reaches it.
        run: fingerprint of the run, so that no shard of another one is made.
        data: the SOURCE, as every worker reaches it.
        teachers: their SPECs.
        device: of the teachers.
        on_bad_image: whether an image that cannot be decoded is listed, or stops the run.
        threads, members_in_turn: of `Tuning`; the rest of it was chosen when the run began, and is in the manifest.
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
        """What this worker's job is asked for."""
        return dataclasses.replace(
            config_of(manifest),
            device=self.device,
            on_bad_image=self.on_bad_image,
            threads=self.threads,
            members_in_turn=self.members_in_turn,
            workers=0,  # processes of Dask's may not have children: threads decode
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one shard: its record, or why it has none.

    Attributes:
        error: one line; `transient` where trying again may help (storage), not where the data or a teacher are wrong;
            `died` where the shard took a process of its own with it, `fatal` where the whole run is to stop at it.
        correct, labelled: images whose hard label the labels hit, and images with a hard label.
        worker: who did it; seconds: how long it took.
    """

    number: int
    record: ShardRecord | None = None
    error: str = ""
    transient: bool = False
    died: bool = False
    fatal: bool = False
    correct: int = 0
    labelled: int = 0
    seconds: float = 0.0
    worker: str = ""


class _Loaded:
    """The job that this process has loaded: a teacher is loaded once, however many shards of its run follow."""

    def __init__(self) -> None:
        self._loaded: tuple[Request, Job] | None = None
        # One shard at a time in a process: teachers share a device, and its memory is planned for one batch.
        self.turn = threading.Lock()

    def job(self, request: Request) -> Job:
        if self._loaded is None or self._loaded[0] != request:
            self._loaded = None  # another run's teachers would only hold memory
            keep_freed_memory()
            manifest = load_root(open_folder(request.out))
            if (found := manifest.run.fingerprint()) != request.run:
                raise MismatchError(f"{request.out}: expected the run {request.run}, found {found}; start again")
            job = reload_job(
                manifest,
                request.out,
                request.config(manifest),
                data=request.data,
                teachers=request.teachers,
                trust_keys=True,  # a hundred million keys are not for every worker to read: its shards' are enough
            )
            self._loaded = request, job
        return self._loaded[1]


_LOADED = _Loaded()


def label_one(request: Request, number: int, keys: str, seconds: float, worker: str = "") -> Outcome:
    """Label and publish one shard. What is wrong with data, teachers or storage is in the outcome, not raised.

    Args:
        keys: `Source.digest` of the shard's samples where the run was begun: only the same ones are labelled.
        seconds: after which the shard counts as hung and this process ends, loading left out; 0: never.
        worker: what the outcome calls whoever did it.
    """
    job = None
    with _LOADED.turn:
        started = time.monotonic()
        try:
            with _watchdog(LOADING_SECONDS if seconds else 0.0, number):
                job = _LOADED.job(request)
            started = time.monotonic()
            with _watchdog(seconds, number):
                return _labelled(job, request, number, keys, started, worker)
        except (SoftLabelError, OSError, MemoryError) as error:
            transient = isinstance(error, StoreError | OSError | MemoryError)
            stops = request.on_bad_image == "error" and isinstance(error, DataError)
            return Outcome(
                number=number,
                error=one_line(error, limit=None),
                transient=transient,
                # Who cannot load anything would fail every shard, and faster than others label them.
                fatal=stops or isinstance(error, MismatchError) or (job is None and not transient),
                seconds=time.monotonic() - started,
                worker=worker,
            )


def _labelled(job: Job, request: Request, number: int, keys: str, started: float, worker: str) -> Outcome:
    plan = job.run.shard(number)
    if job.labeller.source.digest(plan.start, plan.stop) != keys:
        raise MismatchError(
            f"{request.data}: samples {plan.start} to {plan.stop - 1} have other keys here than where the run was begun"
            "; give every worker the same data"
        )
    shard = label_shard(plan, job.labeller)
    record = write_shard(request.out, job.run, plan, shard.rows, shard.bad, fidelity=shard.fidelity)
    return Outcome(
        number=number,
        record=record,
        correct=shard.correct,
        labelled=shard.labelled,
        seconds=time.monotonic() - started,
        worker=worker,
    )


@contextmanager
def _watchdog(seconds: float, number: int) -> Iterator[None]:
    """End the process where a shard takes longer: a hung device still sends heartbeats, and cannot be interrupted."""
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
    """Label the shard that the command line names; the last line of the output is the outcome as JSON."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    request = from_json(Request, json.loads(sys.argv[1]))
    seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    outcome = label_one(request, int(sys.argv[2]), sys.argv[3], seconds, worker=f"process {os.getpid()}")
    print(dumps(to_json(outcome)).decode())
    return 0


def label_alone(request: Request, number: int, keys: str, seconds: float, worker: str = "") -> Outcome:
    """`label_one` in a fresh process of its own, so that a shard that kills its process kills no worker.

    Its own outcome, or one with the signal or status that the process ended with.
    """
    started = time.monotonic()
    asked = [dumps(to_json(request)).decode(), str(number), keys, str(seconds)]
    command = [sys.executable, "-m", "softlabel.generation.worker", *asked]
    # A process that hangs in native code can keep its own watchdog from running.
    limit = LOADING_SECONDS + seconds + _MARGIN_SECONDS if seconds else None
    try:
        # What this worker can import, such as a module that Dask has brought it, its child can too.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ended = subprocess.run(command, capture_output=True, check=False, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        ended = subprocess.CompletedProcess(command, HUNG)
    if ended.returncode == 0 and (lines := ended.stdout.splitlines()):
        return dataclasses.replace(from_json(Outcome, loads(lines[-1])), worker=worker)
    if ended.returncode == HUNG:
        why = f"took longer than {seconds:g} s, alone in a process"
    elif ended.returncode < 0:
        why = f"kills its process ({signal.Signals(-ended.returncode).name}), alone in one too"
    else:
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = f"its process ends with status {ended.returncode}, alone in one too: {' '.join(last)[:300]}"
    return Outcome(number=number, error=why, died=True, seconds=time.monotonic() - started, worker=worker)


if __name__ == "__main__":
    sys.exit(main())
