"""What teachers compute on the way to their logits: an embedding of each sample, and maps of attention.

Both are taken in the forward pass that gives the logits, by hooks, and reduced at once, so that no feature map stays in
memory. `find_features` looks once, on a trial pass, at what there is; a `Probe` takes it from every later pass.

Legend: B batch, C channels or classes, D width of an embedding, H and W height and width, K numbers of an embedding
before its projection, M members, S numbers of all maps of attention.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import TeacherError, UsageError
from softlabel.models import Program
from softlabel.models.taps import Side, hooked, map_attention, pool, tensor_of
from softlabel.models.teacher import Teacher
from softlabel.store.features import ATTENTION, EMBEDDING, SCALE, Features, Tap, make_projection

Taken = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAnswers:
    """What the members answer to a batch, on the device.

    Attributes:
        logits: of each member, float32 (B, C).
        hidden: what enters the only member's last linear layer, (B, D), where the encoding stores it.
        features: of each member, where rows have some.
        copies: logits of each member to the noisy copies of the samples, where rows have their differences.
    """

    logits: list[Tensor]
    hidden: Tensor | None
    features: tuple[Taken, ...]
    copies: tuple[list[Tensor], ...] = ()


@dataclass(frozen=True, slots=True)
class Capture:
    """What hooks have taken, of each pass, reduced: `embedding` and the maps of attention, by the names of modules."""

    sides: dict[str, dict[str, list[Tensor]]]

    @property
    def names(self) -> tuple[str, ...]:
        """What every pass has given."""
        return tuple(self.sides)

    def of_passes(self, subject: str, count: int) -> list[Taken]:
        """What each of so many passes has given.

        Raises:
            UsageError: a module ran more often, or never.
        """
        for name, modules in self.sides.items():
            for module, found in modules.items():
                if len(found) != count:
                    raise UsageError(
                        f"{name}: {subject}: expected {module or 'its answer'} once in each forward pass, found it "
                        f"{len(found)} times in {count}; name another module"
                    )
        return [
            {
                name: torch.cat([found[place] for found in modules.values()], dim=1)
                for name, modules in self.sides.items()
            }
            for place in range(count)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Takes the features of one teacher while it runs.

    Attributes:
        teacher: whose passes are watched.
        tap: of its embedding; None: it has none.
        modules: of its maps of attention.
        matrix: projects embeddings (B, K) to (B, D); None: they stay as they are.
    """

    teacher: Teacher
    tap: Tap | None
    modules: tuple[str, ...] = ()
    matrix: Tensor | None = None

    @classmethod
    def of(cls, teacher: Teacher, features: Features, member: int, device: torch.device) -> "Probe":
        """That of a member, which computes on a device."""
        embedding, attention = features.embedding, features.attention
        matrix = tap = None
        if embedding is not None:
            tap = embedding.taps[member]
            if embedding.projection is not None:
                matrix = torch.from_numpy(make_projection(embedding.projection, tap.width, embedding.width)).to(device)
        return cls(
            teacher=teacher,
            tap=tap,
            modules=() if attention is None else attention.modules[member],
            matrix=matrix,
        )

    @contextmanager
    def watch(self) -> Iterator[Capture]:
        """Take the features of every pass inside the block."""
        tap, model, sides = self.tap, self.teacher.model, dict[str, dict[str, list[Tensor]]]()
        named: list[tuple[str, Side, Callable[[object], None]]] = []  # module, side, what is done with its tensor
        if tap is not None:
            sides[EMBEDDING] = {tap.module: []}
            named.append((tap.module, tap.side, self._keep_embedding(tap, sides[EMBEDDING][tap.module])))
        if self.modules:
            sides[ATTENTION] = {module: [] for module in self.modules}
            named += [(module, "output", _keep_map(found)) for module, found in sides[ATTENTION].items()]
        with ExitStack() as stack:
            if isinstance(model, Program):
                stack.enter_context(model.watching([one[0] for one in named], [one[2] for one in named]))
            else:
                for module, side, keep in named:
                    stack.enter_context(hooked(model.get_submodule(module), side, keep))
            yield Capture(sides)

    def _keep_embedding(self, tap: Tap, kept: list[Tensor]) -> Callable[[object], None]:
        name = self.teacher.spec.text

        def keep(value: object) -> None:
            found = pool(tensor_of(name, value), tap.pool).float()
            if found.shape[1:] != (tap.width,):
                raise UsageError(f"{name}: expected embeddings of {tap.width} numbers, found {tuple(found.shape)}")
            kept.append(found)

        return keep

    def show(self, taken: Taken) -> Tensor:
        """All that it has taken as one row of numbers for each sample, float32."""
        projected = [self.project(taken[EMBEDDING])] if EMBEDDING in taken else []
        return torch.cat([*projected, *([taken[ATTENTION]] if ATTENTION in taken else [])], dim=1)

    def project(self, embedding_BK: Tensor) -> Tensor:
        """The embedding as it is stored, before its type: float32 (B, D)."""
        return embedding_BK if self.matrix is None else embedding_BK @ self.matrix


def make_probes(teachers: Sequence[Teacher], features: Features | None, device: torch.device) -> tuple[Probe, ...]:
    """One for each member; none if rows have no features."""
    if features is None:
        return ()
    return tuple(Probe.of(teacher, features, number, device) for number, teacher in enumerate(teachers))


@contextmanager
def watch_all(probes: Sequence[Probe]) -> Iterator[list[Capture]]:
    """Take the features of all members in every pass inside the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(probe.watch()) for probe in probes]


def _keep_map(found: list[Tensor]) -> Callable[[object], None]:
    return lambda value: found.append(map_attention(tensor_of("attention", value)))


def encode_features(
    features: Features, probes: Sequence[Probe], taken_M: Sequence[Taken]
) -> tuple[dict[str, Tensor], Tensor]:
    """The columns of a batch, and which rows cannot be stored: bool (B,)."""
    columns: dict[str, Tensor] = {}
    if features.embedding is not None:
        both = zip(probes, taken_M, strict=True)
        values_BMD = torch.stack([probe.project(taken[EMBEDDING]) for probe, taken in both], dim=1)
        if features.embedding.type == "int8":
            scale_BM = (values_BMD.abs().amax(dim=2) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            columns[EMBEDDING] = (values_BMD / scale_BM[:, :, None]).round().to(torch.int8).flatten(1)
            columns[SCALE] = scale_BM
        else:
            columns[EMBEDDING] = values_BMD.half().flatten(1)
    if features.attention is not None:
        columns[ATTENTION] = torch.cat([taken[ATTENTION] for taken in taken_M], dim=1).half()
    judged = [column for column in columns.values() if column.is_floating_point()]
    wrong_B = ~torch.stack([column.isfinite().all(dim=1) for column in judged]).all(dim=0)
    return columns, wrong_B


def check_storable(wrong_B: NDArray[np.bool_], keys: Sequence[str]) -> None:
    """Check rows bool (B,) whose features are not finite as they are stored.

    Raises:
        TeacherError: names the first such row.
    """
    if wrong_B.any():
        raise TeacherError(
            f"embedding: expected finite numbers of at most 65,504, found others for sample "
            f"{keys[int(wrong_B.argmax())]!r} ({int(wrong_B.sum())} of {len(keys)} in its batch); use --embedding-type "
            "int8 if they are that large, or --precision fp32"
        )
