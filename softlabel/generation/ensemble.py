"""The members of an ensemble as one function of a batch: side by side, stacked, or in turn on the device.

Legend: B batch, C classes, H height, M members, W width.
"""

import copy
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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

# Tolerance of stacked logits relative to the largest: the order of sums differs.
AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
# Stack only if it takes less than this share of the time in turn.
_WORTH = 0.97
# Numbers in a trial batch on a CPU: 32 images of CIFAR, one of ImageNet.
_TRIAL_VALUES = 3 * 2**15
_TRIALS = 2
# Maximal share of a GPU's memory for weights, to leave memory for a batch.
_MOST_WEIGHTS = 0.7


class Members:
    """The loaded teachers, and how they share the device.

    Attributes:
        transforms: the distinct transforms of the members; a batch has inputs for each.
        groups: numbers of the members that run stacked, see `find_stacks`.
        device: where they compute; in turn, the teachers are stored in main memory.
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
        # Members with equal geometry share one batch; they normalise it on the device.
        keys = [transform.shape for transform in transforms]
        unique = list(dict.fromkeys(keys))
        self.transforms: tuple[InputTransform, ...] = tuple(transforms[keys.index(key)] for key in unique)
        self.transform_of = tuple(unique.index(key) for key in keys)
        self._stacks = stacks or {g[0]: _Stack([self.teachers[number] for number in g]) for g in self.groups}
        self._upload = Upload(self.device)

    def replica(self) -> "Members":
        """Copy the modules but share their weights, so that lanes do not share state that a module keeps in a pass.

        Raises:
            Exception: whatever a network that cannot be copied raises.
        """
        # A graph keeps no state, and the lanes call the same.
        teachers = [t if t.graph else replace(t, model=_copy_sharing_weights(t.model)) for t in self.teachers]
        stacks = {number: stack.replica() for number, stack in self._stacks.items()}
        return Members(teachers, groups=self.groups, in_turn=self.in_turn, device=self.device, stacks=stacks)

    def logits(self, batches: Sequence[Sequence[Inputs]]) -> list[list[Tensor]]:
        """Compute the logits of each batch and member.

        Args:
            batches: each with inputs for every distinct transform.

        Returns:
            For each batch and member float32 (B, C), on the device.
        """
        if not self.in_turn:
            return [self._together(inputs) for inputs in batches]
        found: list[list[Tensor]] = [[] for _ in batches]
        for teacher, transform in zip(self.teachers, self.transform_of, strict=True):
            with _on_device(teacher, self.device) as there:
                for inputs, answers in zip(batches, found, strict=True):
                    answers.append(there.logits(*self._upload([inputs[transform]])))
        return found

    def answers(self, transform: int, batches: Sequence[Inputs]) -> dict[int, list[Tensor]]:
        """Logits (B, C) of each batch, by the number of the member, of the members that take one transform."""
        found: dict[int, list[Tensor]] = {}
        for number, (teacher, own) in enumerate(zip(self.teachers, self.transform_of, strict=True)):
            if own == transform:
                with _on_device(teacher, self.device) if self.in_turn else nullcontext(teacher) as there:
                    found[number] = [there.logits(*self._upload([inputs])) for inputs in batches]
        return found

    @property
    def has_buckets(self) -> bool:
        """Whether samples are computed at lengths of their own."""
        return any(transform.buckets for transform in self.transforms)

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
    """Members of one architecture as one network with an additional axis."""

    def __init__(self, teachers: Sequence[Teacher], state: Any = None) -> None:
        self.teachers = list(teachers)
        models = [teacher.model for teacher in teachers]
        self._state: Any = stack_module_state(models) if state is None else state
        base = copy.deepcopy(models[0]).to("meta")  # the computation; the weights are in the state
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
    """A batch norm in evaluation mode as plain arithmetic, with the same parameters and buffers."""

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
        # In the precision of the statistics, as a batch norm does for inputs of half precision.
        return (inputs * scale_C.view(shape) + shift_C.view(shape)).to(inputs.dtype)


def replace_norms(model: nn.Module) -> None:
    """Replace batch norms by plain arithmetic: `torch.vmap` does not support them on CUDA (torch 2.11)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _EvalNorm(module))


def _copy_sharing_weights(model: nn.Module) -> nn.Module:
    if isinstance(model, Program):  # beside its file it has the outputs alone that are watched
        return copy.copy(model)
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextmanager
def _on_device(teacher: Teacher, device: torch.device) -> Iterator[Teacher]:
    move = teacher.model.place if isinstance(teacher.model, Program) else teacher.model.to
    move(device)
    try:
        yield replace(teacher, device=device)
    finally:
        move(teacher.device)


def load_members(
    load: Callable[[torch.device], list[Teacher]], device: torch.device, tuning: Tuning, count: int
) -> tuple[list[Teacher], bool]:
    """Load the teachers and decide whether they run in turn.

    Args:
        load: loads all of them to a device.
        device: where they compute.
        tuning: may require or exclude running in turn.
        count: number of teachers.

    Returns:
        (teachers, whether they run in turn, in which case they are in main memory).

    Raises:
        UsageError: running in turn is required, but there is only one teacher.
    """
    if tuning.members_in_turn == "yes" and count == 1:
        raise UsageError("members_in_turn: expected several teachers, found one; leave it out")
    host = torch.device("cpu")
    if tuning.members_in_turn == "yes":
        return load(host), True
    try:
        teachers = load(device)
    except torch.OutOfMemoryError:
        if tuning.members_in_turn == "no" or count == 1:
            raise
        teachers = []
    if not teachers or (tuning.members_in_turn == "auto" and count > 1 and _exceeds_memory(teachers, device)):
        del teachers
        torch.cuda.empty_cache()
        log.warning("the members do not fit on %s together: they run in turn", device)
        return load(host), True
    return teachers, False


def _exceeds_memory(teachers: Sequence[Teacher], device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    tensors = [tensor for t in teachers for tensor in (*t.model.parameters(), *t.model.buffers())]
    return (
        sum(tensor.nbytes for tensor in tensors) > _MOST_WEIGHTS * torch.cuda.get_device_properties(device).total_memory
    )


def compile_members(teachers: Sequence[Teacher], *, captured: str | None) -> None:
    """Compile the networks with `torch.compile`, for the one shape of batches.

    Raises:
        UsageError: a network is not a torch module, or what is `captured` is taken from a layer.
    """
    if captured is not None:
        raise UsageError(f"compile: {captured} captures a layer, which compiled networks do not allow; leave it out")
    for teacher in teachers:
        if isinstance(teacher.model, Program):
            raise UsageError(f"compile: {teacher.spec.text} is a program file, not a torch module; leave out --compile")
        if teacher.preprocessing.buckets:
            raise UsageError(f"compile: {teacher.spec.text} takes batches of many lengths; leave out --compile")
        teacher.model.compile(dynamic=False)


def find_stacks(
    teachers: Sequence[Teacher],
    tuning: Tuning,
    *,
    batch_size: int,
    in_turn: bool,
    captured: str | None = None,
    before: Sequence[Sequence[int]] | None = None,
) -> tuple[Group, ...]:
    """Find the members of one architecture that run stacked: all with `stack="yes"`, else if a timed trial is faster.

    Args:
        teachers: the members.
        tuning: may require or exclude stacking.
        batch_size: samples per forward pass.
        in_turn: whether members run in turn.
        captured: what is taken from a layer of each; None: nothing.
        before: groups with which existing shards were labelled; with `stack="auto"` they are used again.

    Returns:
        Groups of member numbers.

    Raises:
        UsageError: stacking is required, but no members can be stacked.
        TeacherError: stacking is required, but the logits of the stacked network differ.
    """
    optimized = tuning.optimize != "none" and teachers[0].device.type == "cpu"
    if captured is not None:
        if tuning.stack == "yes":
            raise UsageError(f"stack: {captured} captures a layer of each member, found --stack yes; leave it out")
        return ()
    if tuning.stack == "no" or tuning.compile or optimized or in_turn:
        return ()
    alike: dict[object, list[int]] = {}
    for number, teacher in enumerate(teachers):
        alike.setdefault(_describe_architecture(teacher), []).append(number)
    groups = tuple(tuple(numbers) for numbers in alike.values() if len(numbers) > 1)
    if tuning.stack == "yes" and not groups:
        raise UsageError("stack: expected members of one architecture and one input size, found none; leave it out")
    if tuning.stack == "auto" and before is not None:
        return tuple(group for group in groups if list(group) in [list(one) for one in before])
    return tuple(group for group in groups if _try_stack(teachers, group, tuning, batch_size))


def _describe_architecture(teacher: Teacher) -> object:
    example, state = teacher.preprocessing.example(1), teacher.model.state_dict()
    # Variable sizes, several lengths, or not a torch module: cannot be stacked.
    if example is None or not state or teacher.preprocessing.buckets:
        return id(teacher)
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items())
    return type(teacher.model), repr(teacher.model), example.shapes, shapes


def _try_stack(teachers: Sequence[Teacher], group: Group, tuning: Tuning, batch_size: int) -> bool:
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
        _, expected = _time(in_turn, device)
        try:
            stack = _Stack(chosen)
            once, found = _time(lambda: stack(inputs), device)
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
                raise TeacherError(f"{named}: stacked logits differ by {off:.2g}; leave out --stack yes")
            log.info("%s: run in turn (stacked logits differ by %.2g)", named, off)
            return False
        if tuning.stack == "yes":
            log.info("%s: stacked, as requested", named)
            return True
        apart, together = [_time(in_turn, device)[0]], [once]
        for _ in range(_TRIALS if once < 1.5 * apart[0] else 0):  # the first stacked pass includes the warm-up
            together.append(_time(lambda: stack(inputs), device)[0])
            apart.append(_time(in_turn, device)[0])
    ratio = statistics.median(together[1:] or together) / statistics.median(apart)
    faster = ratio < _WORTH
    log.info("%s: %s (stacked takes %.2f of the time)", named, "stacked" if faster else "run in turn", ratio)
    return faster


def _time(compute: Callable[[], list[Tensor]], device: torch.device) -> tuple[float, list[Tensor]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    found = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, found


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Set torch's number of threads during the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
