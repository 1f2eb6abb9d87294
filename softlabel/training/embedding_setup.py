"""What students have for losses on their embeddings: where these are taken, what is trained beside them, and negatives.

Legend: C classes, D width of the teacher's embedding, K negatives, M members, N samples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabel.common.random import stream_key
from softlabel.common.spec import parse_spec
from softlabel.errors import UsageError
from softlabel.inputs.base import IGNORE, Inputs
from softlabel.loader.dataset import JoinedDataset
from softlabel.loader.features import decode_features
from softlabel.models.options import FEATURE_OPTIONS
from softlabel.models.taps import OUTPUT
from softlabel.store.encodings import Head
from softlabel.store.features import EMBEDDING, FeatureName
from softlabel.store.reader import Store
from softlabel.training.beside import Beside, Contrasted, Projected, ReusedHead, make_projector
from softlabel.training.config import TrainConfig
from softlabel.training.embedding_losses import EMBEDDING_LOSSES, EmbeddingLossName
from softlabel.training.embedding_student import EmbeddingParts
from softlabel.training.grid import StudentConfig
from softlabel.training.step import Negatives
from softlabel.training.student_tap import find_embedding, find_maps

NEGATIVES = 1024  # of a step of crd, for all of its anchors; the published 16,384 are drawn for each
_DRAWS, _WEIGHTS = 7001, 7002  # numbers of streams of random numbers


def list_features(configs: Sequence[StudentConfig]) -> tuple[FeatureName, ...]:
    """What batches need of the teacher beside its labels."""
    losses = {config.embedding_loss for config in configs} - {"none"}
    found: list[FeatureName] = []
    if losses - {"at"}:
        found.append("embedding")
    if "at" in losses:
        found.append("attention")
    return tuple(found)


def check_embeddings(config: TrainConfig, configs: Sequence[StudentConfig], store: Store | None) -> None:
    """Hold the embedding losses of students against the store; that it has embeddings is the loader's to see.

    Raises:
        UsageError: a loss needs what the store does not have.
    """
    for student in dict.fromkeys(one.student for one in configs):
        for name in set(FEATURE_OPTIONS) & set(parse_spec(student).options):
            if name not in list_features([one for one in configs if one.student == student]):
                raise UsageError(
                    f"student {student}: {name}= says where it is taken, for a loss on it; give --embedding-loss "
                    f"{'at' if name == 'attention' else 'NAME'}"
                )
    if store is not None and not store.run.encoding.labels:
        for one in configs:
            if one.soft_weight > 0:
                raise UsageError(
                    f"soft_weight: expected labels in {store.url}, found embeddings or attention alone (--only); give "
                    "--soft-weight 0 --embedding-loss NAME"
                )
    used = {one.embedding_loss for one in configs} - {"none"}
    if store is not None and not store.run.encoding.labels and not used:
        raise UsageError(
            f"labels: {store.url} has embeddings or attention alone, of which no student makes use; give "
            "--embedding-loss NAME, or leave --labels out"
        )
    if not used or store is None:
        return
    run = store.run
    weights = config.weights if run.kept else None
    if weights is not None and len(set(weights)) > 1:
        raise UsageError(
            f"weights: {weights} average the labels of members, and their embeddings have no average; leave --weights "
            "out, or --embedding-loss"
        )
    if "simkd" in used and not (isinstance(run.encoding, Head) and run.encoding.softcap is None):
        raise UsageError(
            f"embedding-loss simkd: needs the teacher's last layer, which a store of encoding head has, found "
            f"{run.encoding.name} in {store.url}; generate with --encoding head, or use --embedding-loss mse"
        )
    if "crd" in used and config.streaming:
        raise UsageError(
            "embedding-loss crd: takes embeddings of random samples, which labels that are read block by block do not "
            "give; leave --streaming out"
        )


def embedding_width(store: Store) -> int:
    """Numbers of the teacher's embedding of a sample, those of several members side by side."""
    embedding = store.run.embedding
    assert embedding is not None
    return embedding.width * (store.run.members_stored if embedding.kept else 1)


def make_parts(
    config: StudentConfig, model: nn.Module, inputs: Inputs, store: Store, *, samples: int, has_labels: bool
) -> EmbeddingParts:
    """What a student has for the loss on its embedding, its weights from the seed.

    Args:
        config: of the student.
        model: the student.
        inputs: a few samples, as the network takes them.
        store: of the teacher.
        samples: N of the source.
        has_labels: whether the student has classes, hard or soft; else its answer is the embedding.

    Raises:
        UsageError: the student has no such embedding.
    """
    name, options = config.embedding_loss, parse_spec(config.student).options
    assert name != "none"
    if name == "at":
        maps = store.run.attention
        assert maps is not None
        members = store.run.members_stored if maps.kept else 1
        if members > 1:
            raise UsageError(
                f"embedding-loss at: expected the maps of one teacher, found those of {members} in {store.url}; take "
                "one of them with 'softlabel combine', or use another loss"
            )
        sizes = tuple(zip(maps.heights, maps.widths, strict=True))
        tap = find_maps(config.student, model, inputs, options.get("attention"), sizes)
        return EmbeddingParts(tap=tap, beside=Beside(), teacher_sizes=sizes)
    width, asked = embedding_width(store), options.get("embedding", None if has_labels else OUTPUT)
    tap = find_embedding(config.student, model, inputs, asked)
    projector = config.shared.embedding_projector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream_key(config.shared.seed, _WEIGHTS)) % 2**63)
        if name == "simkd":
            beside: Beside = _reuse_head(config, model, tap.modules[0], tap.width, store)
        elif name == "crd":
            beside = Contrasted(tap.width, width, samples)
        elif asked == OUTPUT and tap.width == width and projector is None:
            beside = Beside()
        elif EMBEDDING_LOSSES[name].projects:
            beside = Projected(make_projector(projector or "linear", tap.width, width))
        else:
            beside = Beside()
    return EmbeddingParts(tap=tap, beside=beside)


def _reuse_head(config: StudentConfig, model: nn.Module, module: str, width: int, store: Store) -> ReusedHead:
    layer, extra = model.get_submodule(module), store.extra
    assert extra is not None, "a head store has its safetensors file"
    weight, bias = (torch.from_numpy(np.array(extra[name], dtype=np.float32)) for name in ("weight", "bias"))
    shape = (len(bias), width)
    if not isinstance(layer, nn.Linear) or layer.weight.shape != shape or layer.bias is None:
        raise UsageError(
            f"embedding-loss simkd: student {config.student}: expected a last linear layer {width} to {len(bias)} with "
            f"a bias, which becomes the teacher's, found {module}: {layer}"
        )
    beside = ReusedHead(nn.Linear(width, weight.shape[1]), module, weight, bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    beside.finish_step(model)
    return beside


class NegativeDraws:
    """Samples that crd contrasts a step with: a pure function of (seed, epoch, step).

    Args:
        dataset: of the samples.
        store: of the teacher's embeddings.
        seed: of the run.
        device: where they are needed.
    """

    def __init__(self, dataset: JoinedDataset, store: Store, *, seed: int, device: torch.device) -> None:
        self._dataset, self._store, self._seed, self._device = dataset, store, seed, device
        self._there = np.flatnonzero(dataset.rows >= 0)

    def draw(self, epoch: int, step: int) -> Negatives:
        """Those of a step."""
        run, dataset = self._store.run, self._dataset
        numbers = np.random.default_rng(int(stream_key(self._seed, epoch, step, _DRAWS)))
        count = len(self._there)
        positions = self._there[numbers.integers(0, count, min(NEGATIVES, count))]
        names = list(run.names_of(EMBEDDING))
        stored = self._store.take(dataset.rows_of_epoch(epoch, positions), names).columns
        values_KD = decode_features(run, (EMBEDDING,), stored)[EMBEDDING].flatten(1)
        labels = dataset.labels[positions]
        labels = labels if labels.ndim == 1 else np.full(len(positions), IGNORE)

        def move(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self._device, non_blocking=True)

        return Negatives(
            samples=move(dataset.samples[positions]),
            labels=move(labels.astype(np.int64)),
            embedding=values_KD.to(self._device, non_blocking=True),
            total=count,
        )


def needs_negatives(name: EmbeddingLossName) -> bool:
    """Whether a loss contrasts a batch with other samples."""
    return name == "crd"
