"""The global random numbers of torch, as a value that each student has one of."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from softlabel.common.random import stream_key

State = dict[str, Tensor]


def state_of(device: torch.device) -> State:
    """The state of the CPU's generator, and of the device's."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def restore(state: State, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were before."""
    outside = state_of(device)
    try:
        yield
    finally:
        restore(outside, device)


def seeded(device: torch.device, *parts: int) -> State:
    """The state that follows from these integers, such as a seed and a rank."""
    with kept(device):
        torch.manual_seed(int(stream_key(*parts)))
        return state_of(device)


def same(one: State, other: State) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
