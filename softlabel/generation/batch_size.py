"""Find the fastest batch size of the teachers by short timed trials."""

import logging
import time
from collections.abc import Sequence

import torch

from softlabel.common.device import Tuning, out_of_memory
from softlabel.errors import DataError, TeacherError
from softlabel.generation.ensemble import Members, using_threads
from softlabel.generation.input_reader import InputReader
from softlabel.inputs.base import Inputs

log = logging.getLogger("softlabel")

_SMALLEST, _LARGEST = 8, 4096
_LARGEST_OF_BUCKETS = 256  # each length has a batch that is not full, which is filled up
_GAIN = 1.03  # minimal speed-up of a doubling
_SECONDS = 0.2  # duration of a trial
_SAMPLES = 64  # samples tried to find one that can be decoded


def find_batch_size(members: Members, reader: InputReader, tuning: Tuning) -> int:
    """Double the batch size from 8 until this is no longer faster or memory runs out; return the fastest.

    Raises:
        DataError: none of the first images can be decoded.
        TeacherError: the smallest batch does not fit.
    """
    samples = _read_one(reader)
    most = min(_LARGEST_OF_BUCKETS if members.has_buckets else _LARGEST, max(_SMALLEST, len(reader.source)))
    found: dict[int, float] = {}
    size = _SMALLEST
    with using_threads(tuning.lanes(members.device)[1]):
        while size <= most:
            try:
                found[size] = _measure_rate(members, samples, size)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if not found:
                    raise TeacherError(
                        f"out of memory with a batch of {size}; give a smaller --batch-size, or use --precision bf16"
                    ) from error
                log.info("batch size %d does not fit into memory", size)
                if members.device.type == "cuda":
                    torch.cuda.empty_cache()
                break
            if size // 2 in found and found[size] < _GAIN * found[size // 2]:
                break
            size *= 2
    best = max(found, key=lambda size: found[size])
    rates = ", ".join(f"{rate:,.0f} with {size}" for size, rate in found.items())
    log.warning("batch size %d: samples/s %s", best, rates)
    return best


def _read_one(reader: InputReader) -> tuple[Inputs, ...]:
    """Return the source's first decodable sample as a batch of one for every transform."""
    for index in range(min(_SAMPLES, len(reader.source))):
        batch = reader.batch([index])
        if batch.keys:
            return batch.inputs
    raise DataError(f"{reader.source.name}: none of its first {_SAMPLES} samples can be decoded")


def _measure_rate(members: Members, samples: Sequence[Inputs], size: int) -> float:
    """Return images/s of all members on decoded batches."""
    device = members.device
    whole = [sample[torch.zeros(size, dtype=torch.int64)] for sample in samples]
    members.logits([whole])  # warms up
    _synchronize(device)
    started, passes = time.perf_counter(), 0
    while not passes or time.perf_counter() - started < _SECONDS:
        members.logits([whole])
        passes += 1
        _synchronize(device)
    return passes * size / (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
