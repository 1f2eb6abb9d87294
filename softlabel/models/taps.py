"""What a network computes on the way to its answer, taken by hooks: embeddings, and maps of attention.

Legend: B batch, C channels, H and W height and width, K numbers of an embedding, L tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from softlabel.errors import UsageError

Side = Literal["input", "output"]
Pool = Literal["none", "pixels", "last-pixels", "tokens"]

OUTPUT = "output"  # the name of what a network answers, as in ?embedding=output

# What an answer may be called that is no tensor.
_ANSWERS = ("embedding", "image_embeds", "pooler_output", "last_hidden_state", "logits")
# Of the sides of maps that are taken without being named: 4 stages of an ImageNet network, but not its stem.
_LARGEST_SIDE = 64


@contextmanager
def hooked(module: nn.Module, side: Side, keep: Callable[[object], None]) -> Iterator[None]:
    """Hand what enters a module, or what it gives, to `keep` in every pass inside the block."""
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _, inputs, output: keep(output))
    try:
        yield
    finally:
        handle.remove()


def tensor_of(subject: str, value: object) -> Tensor:
    """The tensor in what a module gives. Raises UsageError where there is none."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        named = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else {}
        value = next((one for name in _ANSWERS if isinstance(one := named.get(name), Tensor)), value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UsageError(f"{subject}: expected a tensor of floats, found {type(value).__name__}; name another module")
    return value


def find_module(subject: str, network: nn.Module, name: str) -> nn.Module:
    """A module of a network by its name. Raises UsageError where there is none."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        there = [one for one, _ in network.named_children()]
        raise UsageError(
            f"{subject}: expected the name of a module, found {name!r}; the network has {', '.join(there)}, and "
            "modules inside them (layer4.0.conv1)"
        ) from None


def find_last_linear(network: nn.Module) -> tuple[str, nn.Linear | None]:
    """The last linear layer of a network and its name; "" and None where there is none."""
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return found[-1] if found else ("", None)


def choose_pool(subject: str, values: Tensor, rows: int) -> Pool:
    """What the embedding of a module is the mean over. Raises UsageError where its output is none of so many rows."""
    pools: dict[int, Pool] = {2: "none", 3: "tokens", 4: "pixels"}
    shape = tuple(values.shape)
    if len(shape) not in pools or shape[0] != rows:
        raise UsageError(
            f"{subject}: expected (batch, D), (batch, D, height, width) or (batch, tokens, D), found {shape}; name "
            "another module, ?embedding=MODULE"
        )
    how = pools[len(shape)]
    return "last-pixels" if how == "pixels" and has_channels_last(values) else how


def pool(values: Tensor, how: Pool) -> Tensor:
    """The mean over nothing, the pixels of (B, K, H, W) or of (B, H, W, K), or the tokens of (B, L, K): (B, K)."""
    if how == "none":
        return values
    axes = {"pixels": (2, 3), "last-pixels": (1, 2), "tokens": (1,)}[how]
    return values.float().mean(dim=axes)


def map_attention(features: Tensor) -> Tensor:
    """The map of attention of (B, C, H, W), or (B, H, W, C): the mean of the squares over the channels, divided by its
    own norm; float32 (B, H * W)."""
    map_BHW = features.float().square().mean(dim=3 if has_channels_last(features) else 1)
    return F.normalize(map_BHW.flatten(1), dim=1)


def has_channels_last(features: Tensor) -> bool:
    """Whether the last axis of a map is that of its channels: where the two before it are equal, and it is not."""
    _, first, second, last = features.shape
    return first == second != last


def measure_map(subject: str, features: Tensor) -> tuple[int, int]:
    """Height and width of a map. Raises UsageError where it is none."""
    if features.dim() != 4:
        raise UsageError(f"{subject}: expected (batch, channels, height, width), found {tuple(features.shape)}")
    height, width = features.shape[1:3] if has_channels_last(features) else features.shape[2:]
    return int(height), int(width)


def find_stages(network: nn.Module, run: Callable[[], object], rows: int) -> dict[str, tuple[int, int]]:
    """The stages of a network: of the modules that give maps of one size, the outermost, and the last of these.

    Args:
        network: whose modules are watched.
        run: makes one forward pass.
        rows: of that pass.

    Returns:
        Height and width of the map of each, by name, in the order in which they end.
    """
    given: list[tuple[str, tuple[int, int]]] = []  # in the order in which they end

    def note(where: str) -> Callable[[object], None]:
        def keep(value: object) -> None:
            if isinstance(value, Tensor) and value.dim() == 4 and len(value) == rows:
                given.append((where, measure_map(where, value)))

        return keep

    with ExitStack() as stack:
        for where, module in network.named_modules():
            stack.enter_context(hooked(module, "output", note(where)))
        run()
    runs = Counter(where for where, _ in given)
    stages: dict[tuple[int, int], str] = {}
    for where, size in given:
        depth = where.count(".")
        is_map = bool(where) and runs[where] == 1 and 1 < max(size) <= _LARGEST_SIDE
        if is_map and (size not in stages or depth <= stages[size].count(".")):
            stages[size] = where
    order = [where for where, _ in given]
    return {where: size for size, where in sorted(stages.items(), key=lambda one: order.index(one[1]))}
