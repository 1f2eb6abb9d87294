"""Configuration of a run of the teachers, shared by the command line, Python and cluster workers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Self, get_args, get_type_hints

from softlabel.common.activation import Activation
from softlabel.common.arguments import check_values, is_plain
from softlabel.common.device import Choice, Optimize, Tuning
from softlabel.errors import UsageError
from softlabel.labels.combine import CombineRule
from softlabel.models.precision import Precision
from softlabel.store.encodings import Encoding
from softlabel.store.features import EmbeddingType, FeatureName
from softlabel.store.manifest import Format
from softlabel.store.view_columns import ViewPolicy
from softlabel.views import view_policy

BadImagePolicy = Literal["skip", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """How labels are computed.

    Attributes:
        activation: what the teachers' outputs are logits of: a softmax over the classes, or a sigmoid of each class by
            itself (several labels at once, or one single output).
        combine: average the members' logits (re-tempers exactly), their probabilities at the temperature (probs), or
            keep every member, to combine them later.
        weights: one number per teacher, normalised to sum 1; equal when absent.
        temperature: logits are divided by it before they are stored.
        calibration: file of 'softlabel calibrate': each teacher's logits are divided by its temperature first.
        batch_size: samples per forward pass; the last batch is padded to it; auto finds the fastest. Halved if memory
            runs out.
        precision: of the forward pass; bf16 and fp16 use autocast.
        seed: of the view policy, and of random factories of teachers.
        ignore_labels: store no hard labels even if the data has them.
        views: number of views per sample; more than a store has adds the missing ones.
        augment: the augmentation of views: center (the unchanged image), crop-flip, inception, trivial, randaugment,
            mixup or cutmix, with options as in inception?size=160, several joined by '+', or a YAML file with a list of
            these and of transforms in torchvision.transforms.v2.
        max_length: of language models: tokens of a document, the rest is left out; when absent, what all teachers take.
        positions: of language models: which positions are labelled: all, or those after which a token counts (of chats
            the answers).
        also: store beside the logits an embedding of each sample (what enters the teacher's last linear layer, or what
            the module of '?embedding=MODULE' in its SPEC gives) or maps of attention (of each stage, or of
            '?attention=MODULE,MODULE'); of several teachers with --combine keep.
        embedding_width: project embeddings to so many numbers, by random signs; as they are when absent.
        embedding_type: of an embedding: float16 when absent, or int8 with a scale for each.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UsageError: a value has the wrong type or is out of range.
    """

    activation: Activation = "softmax"
    combine: CombineRule = "logits"
    weights: Sequence[float] | None = None
    temperature: float = 4.0
    calibration: str | Path | Sequence[float] | None = None
    batch_size: int | Literal["auto"] = 256
    precision: Precision = "fp32"
    seed: int = 0
    ignore_labels: bool = False
    views: int = 1
    augment: str | ViewPolicy = "center"
    max_length: int | None = None
    positions: Literal["all", "masked"] = "all"
    also: Sequence[FeatureName] | None = None
    embedding_width: int | None = None
    embedding_type: EmbeddingType | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        hints = {name: hint for name, hint in get_type_hints(type(self)).items() if is_plain(hint)}
        check_values({name: getattr(self, name) for name in hints}, hints)
        self._check_above_zero("temperature", "views", *(["batch_size"] if self.batch_size != "auto" else []))
        if self.max_length is not None:
            self._check_above_zero("max_length")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed: expected at least 0, found {self.seed}")
        if self.combine == "keep" and self.weights is not None:
            raise UsageError("weights: combine 'keep' does not average; give them to 'softlabel combine'")
        if self.embedding_width is not None:
            self._check_above_zero("embedding_width")
        for name in ("embedding_width", "embedding_type"):
            if getattr(self, name) is not None and "embedding" not in self.features:
                raise UsageError(f"{name}: belongs to --also embedding, found none")

    def _check_above_zero(self, *names: str) -> None:
        for name in names:
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise UsageError(f"{name}: expected a number above 0, found {value}")

    @classmethod
    def of(cls, other: "LabelConfig", **changes: object) -> Self:
        """Copy the fields that this class shares with another configuration, with changes."""
        shared = {one.name for one in fields(cls)} & {one.name for one in fields(other)}
        return cls(**{**{name: getattr(other, name) for name in shared}, **changes})

    @property
    def features(self) -> tuple[FeatureName, ...]:
        """What is stored beside logits, or alone."""
        return tuple(name for name in get_args(FeatureName) if name in (self.also or ()))

    @property
    def view_policy(self) -> ViewPolicy:
        """The view policy.

        Raises:
            UsageError: the augmentation does not exist.
        """
        if isinstance(self.augment, ViewPolicy):
            return self.augment
        return view_policy(self.augment, count=self.views, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(LabelConfig):
    """How a store of labels is written; see `LabelConfig` for the labels.

    Attributes:
        encoding: how logits are stored: an `Encoding`, or the name of one without parameters; 'softlabel plan' shows
            the cost of each in bytes and nats.
        only: store one of these without any logits, also of teachers that give none, such as image encoders.
        format: file format of the shards.
        shard_rows: samples per shard, the most that a killed run loses.
        shard_positions: of language models: labelled positions per shard on average, 4 million when absent; a shard has
            `shard_rows` documents at most.
        grow: label the samples that a store of a smaller dataset lacks; its shards stay.
        on_bad_image: for a sample that cannot be decoded: skip lists it in the manifest, error stops.
        compile: compile the teachers with torch.compile.
        stack: run teachers of one architecture as one network; auto: if a timed trial is faster.
        members_in_turn: move teachers to the device one after another; auto: if they do not fit together.
        optimize: on a CPU, fold the teachers' batch norms into their convolutions, or compile the teachers with
            constant weights (needs a C++ compiler); auto: what a timed trial on samples of the run finds fastest, if
            the run is long enough to pay for it. Logits differ from eager ones by rounding.
        workers: decoding processes; when absent, none on a CPU, up to 8 beside a GPU.
        threads: threads that compute on a CPU, of each worker on a cluster; when absent, torch's default.

    Raises:
        UsageError: as `LabelConfig`.
    """

    encoding: Encoding | str = "float16"
    only: FeatureName | None = None
    format: Format = "parquet"
    shard_rows: int = 16384
    shard_positions: int | None = None
    grow: bool = False
    on_bad_image: BadImagePolicy = "skip"
    compile: bool = False
    stack: Choice = "auto"
    members_in_turn: Choice = "auto"
    optimize: Optimize = "none"
    workers: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        LabelConfig.__post_init__(self)  # super() fails in a dataclass with slots, which is a new class
        self._check_above_zero("shard_rows", *(["shard_positions"] if self.shard_positions is not None else []))
        if self.only is not None:
            self._refuse_label_options(self.only)
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers: expected at least 0, found {self.workers}")

    def _refuse_label_options(self, only: str) -> None:
        """Raises UsageError for options of labels that a store without any would not show."""
        title = self.encoding if isinstance(self.encoding, str) else self.encoding.name
        for name, found, usual in (
            ("activation", self.activation, ("softmax",)),
            ("encoding", title, ("float16", "none")),
            ("temperature", self.temperature, (4.0, 1.0)),
        ):
            if found not in usual:
                raise UsageError(
                    f"{name}: is of logits, of which --only {only} stores none, found {found}; leave it out"
                )
        if isinstance(self.calibration, str | Path):
            raise UsageError(f"calibration: is of logits, of which --only {only} stores none; leave it out")

    @property
    def features(self) -> tuple[FeatureName, ...]:
        wanted = {*(self.also or ()), self.only}
        return tuple(name for name in get_args(FeatureName) if name in wanted)

    @property
    def stores_hidden(self) -> bool:
        """Whether the encoding is what enters the last linear layer."""
        encoding = self.encoding
        kind = Encoding.kinds.get(encoding) if isinstance(encoding, str) else type(encoding)
        return self.only is None and kind is not None and kind.from_hidden

    @property
    def tuning(self) -> Tuning:
        """How the machine is used.

        Raises:
            UsageError: options exclude each other.
        """
        return Tuning(
            threads=self.threads,
            compile=self.compile,
            stack=self.stack,
            members_in_turn=self.members_in_turn,
            optimize=self.optimize,
        )
