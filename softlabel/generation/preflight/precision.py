"""Compare the speed of a half precision with that of float32 on a CPU, which may compute it by conversions.

Legend: B batch.
"""

import time
from dataclasses import replace

from softlabel.generation.labeller import Labeller
from softlabel.generation.preflight.sample import Trial
from softlabel.inputs.base import Inputs
from softlabel.models import LanguageModel, Program
from softlabel.models.teacher import Teacher

_ROWS, _ROUNDS = 16, 3
_SLOWER = 1.1  # ratio of times from which it is reported


def compare_precisions(labeller: Labeller, trial: Trial) -> tuple[str, ...]:
    """Time teachers of half precision on some samples beside float32.

    Returns:
        A finding for each teacher that float32 computes faster.
    """
    if labeller.members.device.type != "cpu":
        return ()
    batch = next(batch for batch in trial.batches if batch.keys)
    findings = []
    for teacher, transform in zip(labeller.teachers, labeller.members.transform_of, strict=True):
        if teacher.precision == "fp32" or isinstance(teacher.model, Program | LanguageModel):
            continue
        inputs = batch.inputs[transform]
        ratio = _compare(teacher, teacher.preprocessing.cut(inputs[: min(_ROWS, len(inputs))]))
        if ratio > _SLOWER:
            findings.append(
                f"{teacher.spec.text}: --precision {teacher.precision} takes {ratio:.1f} times as long as fp32 on this "
                "CPU; use --precision fp32 for speed"
            )
    return tuple(findings)


def _compare(teacher: Teacher, inputs: Inputs) -> float:
    """CPU time relative to float32, of the fastest of some interleaved rounds."""
    sides = (teacher, replace(teacher, precision="fp32"))
    seconds = [float("inf"), float("inf")]
    for number in range(_ROUNDS + 1):
        for place, side in enumerate(sides):
            started = time.process_time()
            side.logits(inputs)
            if number:  # the first is a warm-up
                seconds[place] = min(seconds[place], time.process_time() - started)
    return seconds[0] / max(seconds[1], 1e-9)
