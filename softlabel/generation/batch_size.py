"""Finding, by short timed trials, the batch size with which the teachers are fastest.

Legend: B batch.
"""

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
_GAIN = 1.03  # doubling has to be worth that much
_SECONDS = 0.2  # a trial is repeated for as long
_SAMPLES = 64  # looked at for an image that can be decoded


def find_batch_size(members: Members, reader: InputReader, tuning: Tuning) -> int:
    """The batch size of the most images a second, doubling from 8 until that helps no more or memory runs out.

    Raises:
        DataError: no image at the source's beginning can be decoded.
        TeacherError: not even the smallest batch fits.
    """
    samples = _one_of_each(reader)
    most = min(_LARGEST, max(_SMALLEST, len(reader.source)))
    found: dict[int, float] = {}
    size = _SMALLEST
    with using_threads(tuning.lanes(members.device)[1]):
        while size <= most:
            try:
                found[size] = _rate(members, samples, size)
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
    log.warning("batch size %d: images/s %s", best, rates)
    return best


def _one_of_each(reader: InputReader) -> tuple[Inputs, ...]:
    """A batch of one for every transform: the source's first sample that can be decoded."""
    for index in range(min(_SAMPLES, len(reader.source))):
        batch = reader.batch([index])
        if batch.keys:
            return batch.inputs
    raise DataError(f"{reader.source.name}: none of its first {_SAMPLES} images can be decoded")


def _rate(members: Members, samples: Sequence[Inputs], size: int) -> float:
    """Images/s of all members on batches that are at hand already."""
    device = members.device
    whole = [sample[torch.zeros(size, dtype=torch.int64)] for sample in samples]
    members.logits([whole])  # warms up
    _wait(device)
    started, passes = time.perf_counter(), 0
    while not passes or time.perf_counter() - started < _SECONDS:
        members.logits([whole])
        passes += 1
        _wait(device)
    return passes * size / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
