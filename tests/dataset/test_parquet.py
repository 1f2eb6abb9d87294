"""Parquet sources against raw pyarrow, on the real CIFAR-10 files and on small ones of every layout."""

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

import softlabel.dataset.table_source as table_source
from softlabel.dataset import Source, open_source
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_decode import decode_image

N = 23


def payload(i: int) -> bytes:
    return b"image %d" % i


def columns(n: int = N, **extra: object) -> dict[str, object]:
    """Keys are shuffled names, so that neither order nor number gives them away."""
    names = [f"part/{(7 * i) % n:03d}.jpg" for i in range(n)]
    return {
        "image": pa.array([{"bytes": payload(i), "path": names[i]} for i in range(n)]),
        "label": pa.array([i % 3 for i in range(n)]),
        **extra,
    }


def write(path: Path, data: dict[str, object], *, features: dict[str, object] | None = None, group: int = 5) -> str:
    table = pa.table(data)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> str:
    return write(tmp_path / "small.parquet", columns())


def test_real_cifar_equals_raw_pyarrow(shared_data: Path) -> None:
    path = shared_data / "cifar10-jpeg" / "test.parquet"
    source = open_source(path)
    raw = pq.read_table(path).to_pylist()
    assert (source.kind, source.name, len(source), source.has_labels) == ("parquet", str(path), 10_000, True)
    assert source.class_names is not None
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    assert source.keys() == [row["image"]["path"] for row in raw]
    assert source.labels().tolist() == [row["label"] for row in raw]
    order = np.random.default_rng(0).permutation(len(raw))[:700]
    for sample, index in zip(source.read(order), order, strict=True):
        row = raw[index]
        assert (sample.key, sample.raw, sample.label) == (row["image"]["path"], row["image"]["bytes"], row["label"])
        # The class is part of the path: no label has moved to another image.
        assert source.class_names[sample.label] in sample.key
    assert decode_image(source.read([0])[0].raw).shape == (3, 32, 32)


def test_every_range_across_row_groups(small: str) -> None:
    source = open_source(small)
    expected = pq.read_table(small).to_pylist()
    for start in range(N + 2):
        for stop in [*range(start, N + 3), None]:
            rows = expected[start:stop]
            assert source.keys(start, stop) == [row["image"]["path"] for row in rows]
            assert source.labels(start, stop).tolist() == [row["label"] for row in rows]
            assert source.labels(start, stop).dtype == np.int64
    indices = [22, 0, 4, 5, 5, 19, 1]
    assert [(s.key, s.raw, s.label) for s in source.read(indices)] == [
        (expected[i]["image"]["path"], payload(i), i % 3) for i in indices
    ]
    assert source.read([]) == []


def test_fingerprint_is_the_documented_hash_of_the_ordered_keys(small: str, tmp_path: Path) -> None:
    digest = xxhash.xxh3_128()
    for row in pq.read_table(small).to_pylist():
        key = row["image"]["path"].encode()
        digest.update(np.uint32(len(key)).tobytes() + key)
    assert open_source(small).fingerprint() == digest.hexdigest()
    # The keys alone: not the file's name, its row groups, its labels or its bytes.
    other = columns()
    other["label"] = pa.array([2] * N)
    assert open_source(write(tmp_path / "renamed.parquet", other, group=100)).fingerprint() == digest.hexdigest()
    shuffled = pa.table(columns()).take(pa.array(list(range(N))[::-1]))
    pq.write_table(shuffled, tmp_path / "shuffled.parquet")
    assert open_source(tmp_path / "shuffled.parquet").fingerprint() != digest.hexdigest()


def test_boundaries_between_keys_count() -> None:
    class Two(Source):
        kind, name = "dataset", "two"

        def __init__(self, *keys: str) -> None:
            self._keys = keys

        def __len__(self) -> int:
            return len(self._keys)

        def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
            return list(self._keys[start:stop])

        def labels(self, start: int = 0, stop: int | None = None) -> np.ndarray:
            return np.full(len(self._keys[start:stop]), IGNORE)

        def read(self, indices: object) -> list:
            return []

    assert Two("ab", "c").fingerprint() != Two("a", "bc").fingerprint()


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    table = pa.table(columns())
    (tmp_path / "data").mkdir()
    for part, (start, length) in enumerate([(0, 9), (9, 0), (9, 14)]):
        pq.write_table(table.slice(start, length), tmp_path / "data" / f"train-{part:05d}.parquet", row_group_size=4)
    source = open_source(tmp_path)
    assert source.keys() == [row["path"] for row in table["image"].to_pylist()]
    assert [sample.raw for sample in source.read(range(N))] == [payload(i) for i in range(N)]
    assert len(open_source(f"{tmp_path}?files=data/train-00000*")) == 9
    with pytest.raises(SpecError, match="no Parquet or tar file matches"):
        open_source(f"{tmp_path}?files=test-*")


def test_files_of_two_schemas_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", columns())
    write(tmp_path / "b.parquet", {"image": columns()["image"]})
    with pytest.raises(DataError, match=r"b\.parquet"):
        open_source(tmp_path)


def test_unlabelled_rows(tmp_path: Path) -> None:
    labels = pa.array([0, None, -1, -100, 2] + [None] * (N - 5), type=pa.int64())
    source = open_source(write(tmp_path / "some.parquet", columns(label=labels)))
    assert source.has_labels
    assert source.labels(0, 6).tolist() == [0, IGNORE, IGNORE, IGNORE, 2, IGNORE]
    assert [sample.label for sample in source.read([4, 1])] == [2, IGNORE]
    none = open_source(write(tmp_path / "none.parquet", {"image": columns()["image"]}))
    assert not none.has_labels
    assert set(none.labels().tolist()) == {IGNORE}
    all_null = open_source(write(tmp_path / "null.parquet", columns(label=pa.nulls(N, pa.int64()))))
    assert not all_null.has_labels
    with pytest.raises(DataError, match="found -7"):
        open_source(write(tmp_path / "wrong.parquet", columns(label=pa.array([0, -7] + [1] * (N - 2)))))


def test_ignoring_labels(small: str) -> None:
    for source in (
        open_source(small, ignore_labels=True),
        open_source(f"{small}?label=none"),
        open_source(open_source(small), ignore_labels=True),
    ):
        assert not source.has_labels
        assert source.class_names is None
        assert set(source.labels().tolist()) == {IGNORE}
        assert [sample.label for sample in source.read([3, 4])] == [IGNORE, IGNORE]
        assert source.fingerprint() == open_source(small).fingerprint()


def test_columns_by_other_names(tmp_path: Path) -> None:
    data = {
        "img": pa.array([payload(i) for i in range(N)]),
        "fine_label": pa.array([i % 5 for i in range(N)]),
        "coarse_label": pa.array([i % 2 for i in range(N)]),
        "uid": pa.array([1000 + i for i in range(N)]),
    }
    features = {
        "img": {"_type": "Image"},
        "fine_label": {"_type": "ClassLabel", "names": list("abcde")},
        "coarse_label": {"_type": "ClassLabel", "names": ["x", "y"]},
    }
    path = write(tmp_path / "cifar100.parquet", data, features=features)
    fine = open_source(path)
    assert (fine.class_names, fine.labels(3, 6).tolist()) == (("a", "b", "c", "d", "e"), [3, 4, 0])
    assert fine.findings.left_out == ("column 'coarse_label' may hold labels too; '?label=coarse_label' takes it",)
    source = open_source(f"{path}?label=fine_label&key=uid")
    assert source.class_names == ("a", "b", "c", "d", "e")
    assert source.keys(0, 2) == ["1000", "1001"]
    assert source.labels(3, 6).tolist() == [3, 4, 0]
    assert source.read([7])[0].raw == payload(7)
    assert open_source(f"{path}?label=coarse_label").keys(8, 11) == ["8", "9", "10"]
    assert open_source(f"{path}?label=fine_label&image=img&key=index").keys(0, 1) == ["0"]


@pytest.mark.parametrize("name", ["fine_label", "target", "Label", "class", "category_id", "LABELS", "y"])
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        pytest.param(pa.array([0.0, float("nan"), 2.0, None]), [0, IGNORE, 2, IGNORE], id="floats, as pandas has them"),
        pytest.param(pa.array(["0", "1.0", "", None]), [0, 1, IGNORE, IGNORE], id="texts"),
        pytest.param(pa.array([True, False, True, None]), [1, 0, 1, IGNORE], id="booleans"),
        pytest.param(pa.array(["7", "3", "7", None]).dictionary_encode(), [7, 3, 7, IGNORE], id="categories"),
        pytest.param(pa.array([1, 0, 2, None], type=pa.uint8()), [1, 0, 2, IGNORE], id="bytes"),
    ],
)
def test_labels_by_every_usual_name_and_type(tmp_path: Path, name: str, values: pa.Array, labels: list[int]) -> None:
    data = {"image": pa.array([payload(i) for i in range(4)]), "id": pa.array([1, 2, 3, 4]), name: values}
    source = open_source(write(tmp_path / "a.parquet", data, group=3))
    assert source.labels().tolist() == [sample.label for sample in source.read(range(4))] == labels
    assert source.count_labelled() == sum(label != IGNORE for label in labels)
    assert source.findings.labels_from == f"column {name!r}"


def test_labels_under_unknown_names_are_refused(tmp_path: Path) -> None:
    data = {"image": pa.array([payload(i) for i in range(3)]), "breed": pa.array(["pug", "cat", "pug"])}
    path = write(tmp_path / "a.parquet", data)
    assert open_source(path).findings.without_labels == (
        "no column is called label, '?label=COLUMN' takes one of breed"
    )
    (tmp_path / "names.txt").write_text("cat\npug\n")
    source = open_source(f"{path}?label=breed&classes={tmp_path / 'names.txt'}")
    assert (source.labels().tolist(), source.class_names) == ([1, 0, 1], ("cat", "pug"))
    with pytest.raises(SpecError, match=r"classes= names labels, but no column has labels; add '\?label=COLUMN'"):
        open_source(f"{path}?classes={tmp_path / 'names.txt'}")
    two = {"image": data["image"], "target": pa.array([0, 1, 2]), "class": pa.array([2, 1, 0])}
    with pytest.raises(DataError, match="more than one label column: target, class; choose with"):
        open_source(write(tmp_path / "b.parquet", two))
    boxes = {"image": data["image"], "target": pa.array([[0], [1], [2]])}
    source = open_source(write(tmp_path / "c.parquet", boxes))
    assert not source.has_labels
    assert source.findings.without_labels == "column 'target' holds more than one class per row"
    assert source.findings.left_out == ()


def test_keys_in_a_dictionary_encoded_column(tmp_path: Path) -> None:
    names = pa.array([f"k{i % 2}{i}" for i in range(N)])
    path = write(tmp_path / "a.parquet", columns(uid=names.dictionary_encode()))
    source = open_source(f"{path}?key=uid")
    assert source.keys() == source.key_table(0, N).to_list() == names.to_pylist()
    assert source.read([7])[0].key == "k17"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("image=nope", "no column 'nope'"),
        ("image=label", "expected encoded images as binary"),
        ("key=nope", "no column 'nope'"),
        ("key=image.bytes", "expected strings or integers"),
        ("label=nope", "no column 'nope'"),
        ("label=word", "column 'word': expected a class number, found 'x'; class names need '.classes=FILE'"),
        ("label=image", "expected class numbers, found struct"),
        ("colour=red", "unknown option colour"),
        ("label", "expected name=value"),
        ("label=a&label=b", "given twice"),
    ],
)
def test_wrong_options_name_what_is_there(tmp_path: Path, option: str, message: str) -> None:
    path = write(tmp_path / "a.parquet", columns(word=pa.array(["x"] * N)))
    with pytest.raises((DataError, SpecError), match=message):
        open_source(f"{path}?{option}")


def test_duplicate_keys_are_named_with_the_remedy(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(N)]
    names[20] = names[3]
    names[21] = names[4]
    image = pa.array([{"bytes": payload(i), "path": names[i]} for i in range(N)])
    path = write(tmp_path / "twice.parquet", columns(image=image))
    with pytest.raises(DataError, match=r"'3.jpg' \(samples 3 and 20\) and '4.jpg' \(samples 4 and 21\).*key=index"):
        open_source(path)
    assert open_source(f"{path}?key=index").keys(20, 22) == ["20", "21"]


def test_paths_that_are_null(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    without = pa.array([{"bytes": payload(i), "path": None} for i in range(N)], type=kind)
    assert open_source(write(tmp_path / "all.parquet", columns(image=without))).keys(9, 11) == ["9", "10"]
    some = pa.array([{"bytes": payload(i), "path": f"{i}" if i else None} for i in range(N)], type=kind)
    with pytest.raises(DataError, match=r"1 of 23 rows.*key=index"):
        open_source(write(tmp_path / "some.parquet", columns(image=some)))


def test_a_row_without_bytes_is_a_bad_image(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": None if i == 2 else payload(i), "path": f"{i}"} for i in range(N)], type=kind)
    source = open_source(write(tmp_path / "hole.parquet", columns(image=image)))
    with pytest.raises(DataError, match="no image bytes"):
        decode_image(source.read([2])[0].raw)


def test_labels_beyond_the_class_names(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    with pytest.raises(DataError, match=r"below 2.*found 2"):
        open_source(write(tmp_path / "a.parquet", columns(), features=features))


@pytest.mark.parametrize("content", [b"", b"PAR1 this is no such file PAR1", b"hello"])
def test_a_file_that_is_not_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: expected a Parquet file"):
        open_source(tmp_path / "a.parquet")


def test_a_truncated_file(shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "cifar10-jpeg" / "test.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half\.parquet"):
        open_source(tmp_path / "half.parquet")


def test_empty_file(tmp_path: Path) -> None:
    empty = pa.table(columns()).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    source = open_source(tmp_path / "empty.parquet")
    assert (len(source), source.keys(), source.labels().tolist(), source.has_labels) == (0, [], [], False)


def test_a_cache_smaller_than_the_file_changes_nothing(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_source, "CACHE_BYTES", 1)
    source = open_source(small)
    order = np.random.default_rng(3).permutation(N)
    assert [sample.raw for sample in source.read(order)] == [payload(i) for i in order]


def test_a_range_does_not_load_the_whole_file(shared_data: Path) -> None:
    """Measured as the bytes that this thread reads from the file system cache, by the kernel's count."""
    path = shared_data / "cifar10-jpeg" / "train.parquet"
    source = open_source(path)
    counter = Path(f"/proc/{multiprocessing.current_process().pid}/io")
    if not counter.exists():
        pytest.skip("the kernel does not count what a process reads (/proc/PID/io)")

    def read_so_far() -> int:
        return int(counter.read_text().split()[1])

    before = read_so_far()
    source.read(range(20_000, 20_100))
    assert read_so_far() - before < path.stat().st_size / 4


def _read_in_child(source: Source, queue: "multiprocessing.Queue[list[object]]") -> None:
    queue.put([sample.raw for sample in source.read([22, 0, 11])])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_in_use_goes_to_another_process(small: str, method: str) -> None:
    source = open_source(small)
    source.read([0])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(source, queue))
    child.start()
    assert queue.get() == [payload(22), payload(0), payload(11)]
    child.join()
    assert source.read([5])[0].raw == payload(5)


def test_a_pickled_source_carries_no_images(shared_data: Path) -> None:
    source = open_source(shared_data / "cifar10-jpeg" / "train.parquet")
    source.read(range(1000))
    pickled = pickle.dumps(source)
    assert len(pickled) < 20_000
    assert pickle.loads(pickled).fingerprint() == source.fingerprint()


def test_a_file_replaced_by_another_is_noticed(small: str) -> None:
    pickled = pickle.dumps(open_source(small))
    write(Path(small), columns(4))
    with pytest.raises(DataError, match="expected 23 rows, found 4"):
        pickle.loads(pickled).read([0])


def test_part_of_a_source(small: str) -> None:
    whole = open_source(small)
    part = open_source(f"{small}?rows=4:9")
    assert len(part) == 5
    assert part.keys() == whole.keys(4, 9)
    assert part.keys(1, 3) == whole.keys(5, 7)
    assert part.labels(2).tolist() == whole.labels(6, 9).tolist()
    assert part.read([0, 4]) == whole.read([4, 8])
    assert part.fingerprint() != whole.fingerprint()
    assert open_source(f"{small}?rows=:3").keys() == whole.keys(0, 3)
    assert open_source(f"{small}?rows=20:").keys() == whole.keys(20)
    assert len(open_source(f"{small}?rows=20:99")) == 3
    for wrong in ("5", "a:b", "9:4", "-3:"):
        with pytest.raises(SpecError, match="START:STOP"):
            open_source(f"{small}?rows={wrong}")
