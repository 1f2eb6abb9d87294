"""Dataclasses of the manifest: a store's identity (Run), its shards (ShardRecord), and the root that lists both.

Runs with equal fingerprints write interchangeable shards. Settings that do not change labels (device, batch size,
versions) are in `recorded`. The plan of shards is a pure function of the Run.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from softlabel.common.activation import Activation
from softlabel.common.multi_hot import MULTI_HOT
from softlabel.store.columns import ROW_NAMES, Column
from softlabel.store.derived import Derived
from softlabel.store.differences import find_differences
from softlabel.store.encodings import Encoding, Float16
from softlabel.store.features import ATTENTION, Attention, Embedding, FeatureName, Features
from softlabel.store.fidelity import Fidelity
from softlabel.store.file_refs import ExtraRef, SegmentRef
from softlabel.store.strict_json import ABSENT, OMIT, dumps, to_json
from softlabel.store.token_rows import TokenRun, per_position, token_columns
from softlabel.store.view_columns import DIFFERENCE, ViewPolicy, check_pairs, view_columns

# 2: rows have view columns; 3: independent sigmoids; 4: tokens; 5: features or differences; 6: any, compressed; else 1
FORMAT_VERSIONS = (1, 2, 3, 4, 5, COMPRESSED_VERSION := 6)
ROOT_NAME, ROOT_LIMIT = "manifest.json", 16 << 20  # bytes; 21,841 class names and 100,000 shards need about 2 MB
SUFFIX = {"parquet": "parquet", "hdf5": "h5"}
SHARD_FILE = re.compile(r"shards/([0-9]{5,12})-([0-9a-f]{32})\.(parquet|h5)")

Format = Literal["parquet", "hdf5"]
Compression = Literal["none", "zstd"]  # of what a row has beside labels; see FORMAT.md
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A teacher: SPEC, SHA-256 of the weights, preprocessing and precision.

    Its logits are first divided by `calibration`, its own temperature.
    """

    spec: str
    sha256: str
    preprocessing: Json = field(default_factory=dict)
    precision: str = "fp32"
    num_classes: int = 0
    calibration: float = field(default=1.0, metadata=OMIT)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", float(self.calibration))
        if not 0 < self.calibration < float("inf"):
            raise ValueError(f"calibration: expected above 0, found {self.calibration}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Combine:
    """How members form a row: `logits` or `probs` average them with `weights`, `keep` stores all of them."""

    rule: str = "logits"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # 1 and 1.0 have different texts, and the fingerprint hashes the text.
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The size of a complete store before it grew; `views` only if it had fewer than now."""

    rows: int
    fingerprint: str
    views: int | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """The labelled dataset. `fingerprint` hashes the ordered keys; `earlier` lists the extents before it grew."""

    kind: str
    rows: int
    fingerprint: str
    has_labels: bool = True
    earlier: tuple[Extent, ...] = ()

    def __post_init__(self) -> None:
        sizes = [extent.rows for extent in self.earlier] + [self.rows]
        if sizes != sorted(sizes) or sizes[0] < 0:
            raise ValueError(f"dataset extents must grow, found {sizes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Shard `number` holds `view` of the samples `start` to `stop` of the dataset; the `part`-th growth wrote it."""

    number: int
    view: int
    start: int
    stop: int
    part: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Derived):
    """The identity of a store: runs with equal fingerprints write interchangeable shards. The compression is that of
    new stores unless it is given."""

    format: Format
    num_classes: int
    temperature: float
    encoding: Encoding = field(default_factory=Float16)
    combine: Combine = field(default_factory=Combine)
    members: tuple[Member, ...]
    dataset: DatasetInfo
    views: ViewPolicy = field(default_factory=ViewPolicy)
    input: str = field(default="image", metadata=OMIT)
    shard_rows: int
    class_names: tuple[str, ...] | None = None
    activation: Activation = field(default="softmax", metadata=OMIT)
    tokens: TokenRun | None = field(default=None, metadata=OMIT)
    features: Features | None = field(default=None, metadata=OMIT)
    compression: Compression | None = field(default=None, metadata={ABSENT: "none"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        usual: Compression = "none" if self.format == "hdf5" else "zstd"
        object.__setattr__(self, "compression", self.compression or usual)
        if self.compression not in ("none", usual):
            raise ValueError(f"compression: expected {usual!r} in {self.format} shards, found {self.compression!r}")
        if not int(self.encoding.labels) <= self.num_classes < 2**31:
            raise ValueError(f"num_classes: expected at least 1, found {self.num_classes}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected above 0, found {self.temperature}")
        if self.shard_rows < 1 or not 1 <= self.views.count < 2**31 or not self.members:
            raise ValueError("shard_rows, views and members: expected at least 1 of each")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names: expected {self.num_classes}, found {len(self.class_names)}")
        self.encoding.check_activation(self.activation)
        if self.tokens is not None:
            self.tokens.check_run(self.input, self.activation, self.num_classes, views=bool(self.view_columns))
        elif self.input == "tokens":
            raise ValueError("input: 'tokens' needs the field 'tokens'")
        if self.features is not None:
            self.features.check_run(len(self.members), kept=self.kept, of_tokens=self.tokens is not None)
        elif not self.encoding.labels:
            raise ValueError("encoding 'none': expected features, found a run without them")
        if self.views.directions:
            check_pairs(self.activation, self.combine.rule, len(self.members), labels=self.encoding.labels)
        if not self.encoding.knows(self.temperature):
            raise ValueError(f"encoding: its temperatures {self.encoding.declared} lack {self.temperature}")
        # An extent keeps its views only if they are fewer than now, so that equal histories have equal texts.
        now = self.views.count
        earlier = tuple(
            dataclasses.replace(one, views=None) if one.views == now else one for one in self.dataset.earlier
        )
        object.__setattr__(self, "dataset", dataclasses.replace(self.dataset, earlier=earlier))
        sizes = list(self._list_sizes())
        for (rows, views), (next_rows, next_views) in itertools.pairwise(sizes):
            if not (0 < views <= next_views and rows <= next_rows and (views == next_views) != (rows == next_rows)):
                raise ValueError(f"dataset extents must grow by samples or by views, found {sizes} (samples, views)")
        names = [column.name for column in self.columns]
        assert len({*names, *ROW_NAMES}) == len(names) + len(ROW_NAMES)

    @property
    def kept(self) -> bool:
        """Whether a row holds every member, (M, C), instead of their combination, (C,)."""
        return self.combine.rule == "keep"

    @property
    def members_stored(self) -> int:
        """M of a row: the number of members if they are kept, else 1."""
        return len(self.members) if self.kept else 1

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns of a row: the encoding's, the sample's, then those of features."""
        return self._derive("columns", lambda: (*self.label_columns, *self.sample_columns, *self.feature_columns))

    @property
    def label_columns(self) -> tuple[Column, ...]:
        """The encoding's columns: of each row, or of each labelled position of it."""
        return self._derive("label columns", self._find_label_columns)

    def _find_label_columns(self) -> tuple[Column, ...]:
        columns = self.encoding.columns(num_classes=self.num_classes, members=self.members_stored)
        return columns if self.tokens is None else per_position(columns)

    @property
    def sample_columns(self) -> tuple[Column, ...]:
        """What a row has beside its labels, whatever their encoding: tokens, or hard labels, the view and the
        differences of the logits of its noisy copies."""
        if self.tokens is not None:
            return token_columns(self.num_classes)
        if directions := self.views.directions:
            return (*self.view_columns, Column(name=DIFFERENCE, dtype="<f2", width=directions * self.num_classes))
        if self.activation == "softmax" or not self.dataset.has_labels:
            return self.view_columns
        return (Column(name=MULTI_HOT, dtype="|i1", width=self.num_classes), *self.view_columns)

    @property
    def embedding(self) -> Embedding | None:
        """The embedding that rows have, also that of encoding `head`; None: they have none."""
        if self.features is not None and self.features.embedding is not None:
            return self.features.embedding
        if (hidden := self.encoding.hidden_form) is None or self.tokens is not None:
            return None
        width, kind = hidden
        return Embedding(width=width, type=kind, kept=self.kept)

    @property
    def attention(self) -> Attention | None:
        """The maps of attention that rows have; None: they have none."""
        return None if self.features is None else self.features.attention

    @property
    def feature_columns(self) -> tuple[Column, ...]:
        """The columns of features."""
        return self._derive("features", lambda: self.features.columns(self.members_stored) if self.features else ())

    def names_of(self, feature: FeatureName) -> tuple[str, ...]:
        """Names of the columns that hold a feature which rows have."""
        if feature == ATTENTION:
            return (ATTENTION,)
        if self.features is None or self.features.embedding is None:
            return tuple(column.name for column in self.label_columns)
        return tuple(column.name for column in self.features.embedding.columns(self.members_stored))

    @property
    def view_columns(self) -> tuple[Column, ...]:
        """The view's columns; none if a view is the unchanged image."""
        return view_columns(self.views.policy)

    @property
    def format_version(self) -> int:
        """Format version of the stores of this run."""
        if self.compression != "none":
            return COMPRESSED_VERSION
        if self.features is not None or self.views.directions:
            return 5
        if self.tokens is not None:
            return 4
        return 3 if self.activation == "sigmoid" else 2 if self.view_columns else 1

    def fingerprint(self, part: int | None = None) -> str:
        """Return the xxh3-128 of the canonical JSON, of the run as it was at growth `part` if given."""
        part = len(self.dataset.earlier) if part is None else part
        # Every shard that is opened is compared with it.
        return self._derive(("print", part), lambda: xxhash.xxh3_128_hexdigest(dumps(to_json(self._as_of(part)))))

    def _as_of(self, part: int) -> "Run":
        then = self.extents[part]
        assert then.views is not None
        dataset = dataclasses.replace(
            self.dataset, rows=then.rows, fingerprint=then.fingerprint, earlier=self.extents[:part]
        )
        return dataclasses.replace(self, dataset=dataset, views=dataclasses.replace(self.views, count=then.views))

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The extents before each growth and the current one, each with its number of views."""
        now = Extent(rows=self.dataset.rows, fingerprint=self.dataset.fingerprint)
        count = self.views.count
        return tuple(dataclasses.replace(one, views=one.views or count) for one in (*self.dataset.earlier, now))

    def grew_from(self, other: "Run") -> bool:
        """Whether this run is `other`, grown: the shards of `other` are then its first ones."""
        part = len(other.dataset.earlier)
        return part < len(self.dataset.earlier) and self._as_of(part) == other

    def _list_sizes(self) -> Iterable[tuple[int, int]]:
        """Return (samples, views) of each extent."""
        return ((extent.rows, extent.views or self.views.count) for extent in self.extents)

    def _iter_growths(self) -> Iterable[tuple[range, range, int]]:
        """Yield (new samples, new views, shards per view) of each growth, in samples or in views."""
        rows = views = 0
        for next_rows, next_views in self._list_sizes():
            grew = views and next_views > views
            samples = range(next_rows) if grew else range(rows, next_rows)
            yield samples, range(views if grew else 0, next_views), -(-len(samples) // self.shard_rows)
            rows, views = next_rows, next_views

    @property
    def shard_count(self) -> int:
        return sum(per_view * len(views) for _, views, per_view in self._iter_growths())

    def shard(self, number: int) -> ShardPlan:
        """Return the plan of one shard.

        Raises:
            ValueError: the plan has fewer shards.
        """
        first = 0
        for part, (samples, views, per_view) in enumerate(self._iter_growths()):
            if 0 <= number - first < per_view * len(views):
                view, position = divmod(number - first, per_view)
                begin = samples.start + position * self.shard_rows
                end = min(begin + self.shard_rows, samples.stop)
                return ShardPlan(number=number, view=views.start + view, start=begin, stop=end, part=part)
            first += per_view * len(views)
        raise ValueError(f"shard {number}: the plan has {self.shard_count} shards")

    def plan(self) -> list[ShardPlan]:
        """Return the plan of every shard, views outermost."""
        return [self.shard(number) for number in range(self.shard_count)]

    def differences(self, other: "Run") -> list[str]:
        """Return in words where `other` (this run) differs from `self` (the store); empty if interchangeable."""
        return find_differences(to_json(self), to_json(other))


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A sample that could not be labelled: its position in the dataset, its key and the reason."""

    index: int
    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A published shard in the manifest; `file` is shards/{number}-{xxh3}.{suffix}.

    Raises:
        ValueError: a field is out of range, or `file` does not match.
    """

    number: int
    file: str
    rows: int
    bytes: int
    xxh3: str
    first_key: str | None = None
    last_key: str | None = None
    bad: tuple[BadRow, ...] = ()
    fidelity: Fidelity | None = None

    def __post_init__(self) -> None:
        found = SHARD_FILE.fullmatch(self.file)
        if not found or int(found[1]) != self.number or found[2] != self.xxh3:
            raise ValueError(f"file: expected shards/{self.number:05d}-<xxh3>.<suffix>, found {self.file[:80]!r}")
        if self.rows < 0 or self.bytes < 0:
            raise ValueError(f"rows and bytes: expected 0 or more, found {self.rows} and {self.bytes}")


def shard_file(number: int, xxh3: str, format: Format) -> str:
    return f"shards/{number:05d}-{xxh3}.{SUFFIX[format]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    bad: int = 0
    fidelity: Fidelity | None = None

    def __add__(self, record: ShardRecord) -> "Totals":
        return Totals(
            shards=self.shards + 1,
            rows=self.rows + record.rows,
            bytes=self.bytes + record.bytes,
            bad=self.bad + len(record.bad),
            fidelity=Fidelity.total([(self.rows, self.fidelity), (record.rows, record.fidelity)]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The root, manifest.json. `complete` is true once every planned shard is recorded."""

    format: Literal["softlabel-store"] = "softlabel-store"
    format_version: int = 1
    store_id: str
    complete: bool = False
    run: Run
    recorded: Json = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    segments: tuple[SegmentRef, ...] = ()
    extra: tuple[ExtraRef, ...] = ()

    def __post_init__(self) -> None:
        if self.format_version != self.run.format_version:
            raise ValueError(f"format_version: expected {self.run.format_version}, found {self.format_version}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """An immutable list of records, in a file named by the hash of its content."""

    shards: tuple[ShardRecord, ...]
