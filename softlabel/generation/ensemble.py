"""The members of an ensemble as one function of a batch: in one another's company, stacked, or in turns on the device.

Legend: B batch, C classes, H height, M members, W width.
"""

import copy
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from softlabel.common.device import Tuning, out_of_memory
from softlabel.errors import TeacherError, UsageError, one_line
from softlabel.generation.transfer import Upload
from softlabel.inputs.base import Inputs, InputTransform
from softlabel.models import Program, logits_of
from softlabel.models.precision import computing
from softlabel.models.teacher import Teacher

log = logging.getLogger("softlabel")

Group = tuple[int, ...]

# How far stacked logits may lie from those of the members in turn, relative to the largest: another order of sums.
AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
# Stacking has to be worth it: below this share of the time that the members in turn take.
_WORTH = 0.97
# Numbers that a trial on a CPU feeds in: 32 images of CIFAR, one of ImageNet.
_TRIAL_VALUES = 3 * 2**15
_TRIALS = 2
# Above this share of a GPU's memory the weights leave too little for a batch.
_MOST_WEIGHTS = 0.7


class Members:
    """What a lane runs: the loaded teachers, and how they share the device.

    Attributes:
        transforms: the distinct ones among the members; a batch comes as inputs for each.
        groups: numbers of the members that run stacked, see `find_stacks`.
        device: where they compute; in turns, the teachers themselves wait in main memory.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        groups: Sequence[Group] = (),
        in_turn: bool = False,
        device: torch.device | None = None,
        stacks: Mapping[int, "_Stack"] | None = None,
    ) -> None:
        self.teachers, self.in_turn, self.groups = tuple(teachers), in_turn, tuple(groups)
        self.device = teachers[0].device if device is None else device
        transforms = [teacher.preprocessing for teacher in teachers]
        # Members that fit samples alike share one batch; normalisation differs and happens on the device.
        keys = [transform.shape for transform in transforms]
        unique = list(dict.fromkeys(keys))
        self.transforms: tuple[InputTransform, ...] = tuple(transforms[keys.index(key)] for key in unique)
        self.transform_of = tuple(unique.index(key) for key in keys)
        self._stacks = stacks or {g[0]: _Stack([self.teachers[number] for number in g]) for g in self.groups}
        self._upload = Upload(self.device)

    def replica(self) -> "Members":
        """The same weights in modules of their own: what a module notes down during a pass is then each lane's own.

        Raises:
            Exception: whatever a network that cannot be copied raises.
        """
        teachers = [replace(teacher, model=_sharing(teacher.model)) for teacher in self.teachers]
        stacks = {number: stack.replica() for number, stack in self._stacks.items()}
        return Members(teachers, groups=self.groups, in_turn=self.in_turn, device=self.device, stacks=stacks)

    def logits(self, batches: Sequence[Sequence[Inputs]]) -> list[list[Tensor]]:
        """Logits of each batch and member, float32 (B, C) on the device.

        Args:
            batches: each as inputs for every distinct transform.
        """
        if not self.in_turn:
            return [self._together(inputs) for inputs in batches]
        found: list[list[Tensor]] = [[] for _ in batches]
        for teacher, transform in zip(self.teachers, self.transform_of, strict=True):
            with _moved(teacher, self.device) as there:
                for inputs, answers in zip(batches, found, strict=True):
                    answers.append(there.logits(*self._upload([inputs[transform]])))
        return found

    def upload(self, batches: Sequence[Inputs]) -> list[Inputs]:
        return self._upload(batches)

    def _together(self, batches: Sequence[Inputs]) -> list[Tensor]:
        there = self._upload(batches)
        inputs = [there[transform] for transform in self.transform_of]
        found: dict[int, Tensor] = {}
        for number, teacher in enumerate(self.teachers):
            group = next((group for group in self.groups if number in group), (number,))
            if len(group) == 1:
                found[number] = teacher.logits(inputs[number])
            elif number == group[0]:
                answers = self._stacks[number]([inputs[member] for member in group])
                found.update(zip(group, answers, strict=True))
        return [found[number] for number in range(len(self.teachers))]


class _Stack:
    """Members of one architecture as one network with a further axis."""

    def __init__(self, teachers: Sequence[Teacher], state: Any = None) -> None:
        self.teachers = list(teachers)
        models = [teacher.model for teacher in teachers]
        self._state: Any = stack_module_state(models) if state is None else state
        base = copy.deepcopy(models[0]).to("meta")  # the way of the data; the weights are in the state
        if teachers[0].device.type == "cuda":
            replace_norms(base)
        spec = teachers[0].spec.text

        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], tensors: dict[str, Tensor]) -> Tensor:
            def network(*args: Tensor, **named: Tensor) -> Any:
                return functional_call(base, (parameters, buffers), args, named)

            return logits_of(spec, Inputs(tensors).call(network))

        self._call: Callable[..., Tensor] = torch.vmap(call)

    def replica(self) -> "_Stack":
        return _Stack(self.teachers, self._state)

    def __call__(self, batches: Sequence[Inputs]) -> list[Tensor]:
        first = self.teachers[0]
        with torch.inference_mode(), computing(first.precision, first.device):
            finished = [t.preprocessing.finish(x).tensors for t, x in zip(self.teachers, batches, strict=True)]
            stacked = {name: torch.stack([tensors[name] for tensors in finished]) for name in finished[0]}
            return list(self._call(*self._state, stacked).float())


class _EvalNorm(nn.Module):
    """A batch norm in evaluation mode as plain arithmetic, with the parameters and buffers of the one it replaces."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name, parameter in norm.named_parameters():
            self.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, inputs: Tensor) -> Tensor:
        assert isinstance(self.running_var, Tensor)
        assert isinstance(self.running_mean, Tensor)
        scale_C = (self.running_var + self.eps).rsqrt()
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        scale_C = scale_C if weight is None else scale_C * weight
        shift_C = -self.running_mean * scale_C
        shift_C = shift_C if bias is None else shift_C + bias
        shape = (1, -1, *([1] * (inputs.dim() - 2)))
        # In the precision of the statistics, as a batch norm does it for inputs of half precision.
        return (inputs * scale_C.view(shape) + shift_C.view(shape)).to(inputs.dtype)


def replace_norms(model: nn.Module) -> None:
    """Replace batch norms of a network in evaluation mode by plain arithmetic: on CUDA `torch.vmap` has no rule for
    them (torch 2.11: "querying is_contiguous inside of vmap")."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _EvalNorm(module))


def _sharing(model: nn.Module) -> nn.Module:
    if isinstance(model, Program):  # a file that is run notes nothing down
        return model
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextmanager
def _moved(teacher: Teacher, device: torch.device) -> Iterator[Teacher]:
    move = teacher.model.place if isinstance(teacher.model, Program) else teacher.model.to
    move(device)
    try:
        yield replace(teacher, device=device)
    finally:
        move(teacher.device)


# ---- how they share the device ----


def load_members(
    load: Callable[[torch.device], list[Teacher]], device: torch.device, tuning: Tuning, count: int
) -> tuple[list[Teacher], bool]:
    """The teachers, and whether they take turns on the device (they lie in main memory then).

    Args:
        load: loads all of them to a device.
        count: how many there are.

    Raises:
        UsageError: turns are asked for, and there is one teacher alone.
    """
    if tuning.members_in_turn == "yes" and count == 1:
        raise UsageError("members_in_turn: expected several teachers to take turns, found one; leave it out")
    host = torch.device("cpu")
    if tuning.members_in_turn == "yes":
        return load(host), True
    try:
        teachers = load(device)
    except torch.OutOfMemoryError:
        if tuning.members_in_turn == "no" or count == 1:
            raise
        teachers = []
    if not teachers or (tuning.members_in_turn == "auto" and count > 1 and _crowded(teachers, device)):
        del teachers
        torch.cuda.empty_cache()
        log.warning("the members do not fit on %s together: they take turns on it", device)
        return load(host), True
    return teachers, False


def _crowded(teachers: Sequence[Teacher], device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    tensors = [tensor for t in teachers for tensor in (*t.model.parameters(), *t.model.buffers())]
    return (
        sum(tensor.nbytes for tensor in tensors) > _MOST_WEIGHTS * torch.cuda.get_device_properties(device).total_memory
    )


def compile_members(teachers: Sequence[Teacher], *, head: bool) -> None:
    """Let `torch.compile` have the networks, for the one shape that batches have.

    Raises:
        UsageError: a network that is no torch module, or one whose last layer is listened to.
    """
    if head:
        raise UsageError("compile: encoding head listens to a layer that a compiled network has no more; leave it out")
    for teacher in teachers:
        if isinstance(teacher.model, Program):
            raise UsageError(f"compile: {teacher.spec.text} is a file that is run as it is; leave out --compile")
        teacher.model.compile(dynamic=False)


def find_stacks(
    teachers: Sequence[Teacher],
    tuning: Tuning,
    *,
    batch_size: int,
    in_turn: bool,
    before: Sequence[Sequence[int]] | None = None,
) -> tuple[Group, ...]:
    """Which members run stacked: those of one architecture, where that is asked for, or faster by a timed trial.

    before: how they ran when the shards that are there were labelled. The others are labelled so too, where nothing
    else is asked for: a trial could end otherwise this time.

    Raises:
        UsageError: stacking is asked for, and there is nothing to stack.
        TeacherError: it is asked for, and the stacked network does not answer what the members do.
    """
    if tuning.stack == "no" or tuning.compile or in_turn:
        return ()
    alike: dict[object, list[int]] = {}
    for number, teacher in enumerate(teachers):
        alike.setdefault(_architecture(teacher), []).append(number)
    groups = tuple(tuple(numbers) for numbers in alike.values() if len(numbers) > 1)
    if tuning.stack == "yes" and not groups:
        raise UsageError("stack: expected members of one architecture and one input size, found none; leave it out")
    if tuning.stack == "auto" and before is not None:
        return tuple(group for group in groups if list(group) in [list(one) for one in before])
    return tuple(group for group in groups if _stacks(teachers, group, tuning, batch_size))


def _architecture(teacher: Teacher) -> object:
    example, state = teacher.preprocessing.example(1), teacher.model.state_dict()
    if example is None or not state:  # samples of many sizes, or a network that is no module of torch: alone
        return id(teacher)
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items())
    return type(teacher.model), repr(teacher.model), example.shapes, shapes


def _stacks(teachers: Sequence[Teacher], group: Group, tuning: Tuning, batch_size: int) -> bool:
    chosen = [teachers[number] for number in group]
    named = f"members {', '.join(str(number + 1) for number in group)}"
    device, transform = chosen[0].device, chosen[0].preprocessing
    example = transform.example(1)
    assert example is not None
    values = sum(tensor.numel() for tensor in example.tensors.values())
    rows = batch_size if device.type == "cuda" else max(1, min(batch_size, _TRIAL_VALUES // values))
    trial = transform.example(rows)
    assert trial is not None
    trial = trial.to(device)
    inputs = [trial] * len(group)

    def in_turn() -> list[Tensor]:
        return [teacher.logits(trial) for teacher in chosen]

    with using_threads(tuning.lanes(device)[1]):
        _, expected = _timed(in_turn, device)
        try:
            stack = _Stack(chosen)
            once, found = _timed(lambda: stack(inputs), device)
        except Exception as error:
            if tuning.stack == "yes" and not out_of_memory(error):
                raise TeacherError(
                    f"{named}: cannot be stacked: {one_line(error, with_type=True)}; leave out --stack yes"
                ) from error
            log.info("%s: run in turn (cannot be stacked: %s)", named, one_line(error, with_type=True))
            return False
        limit = AGREEMENT[chosen[0].precision] * (1 + max(float(z.abs().max()) for z in expected))
        off = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
        if not off <= limit:
            if tuning.stack == "yes":
                raise TeacherError(f"{named}: stacked they answer otherwise, by {off:.2g}; leave out --stack yes")
            log.info("%s: run in turn (stacked they answer otherwise, by %.2g)", named, off)
            return False
        if tuning.stack == "yes":
            log.info("%s: stacked, as asked for", named)
            return True
        apart, together = [_timed(in_turn, device)[0]], [once]
        for _ in range(_TRIALS if once < 1.5 * apart[0] else 0):  # the first stacked pass warms up as well
            together.append(_timed(lambda: stack(inputs), device)[0])
            apart.append(_timed(in_turn, device)[0])
    ratio = statistics.median(together[1:] or together) / statistics.median(apart)
    faster = ratio < _WORTH
    log.info("%s: %s (stacked takes %.2f of the time)", named, "stacked" if faster else "run in turn", ratio)
    return faster


def _timed(compute: Callable[[], list[Tensor]], device: torch.device) -> tuple[float, list[Tensor]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    found = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, found


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Compute with this many of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
