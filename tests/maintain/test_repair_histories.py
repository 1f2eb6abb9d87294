"""Lost and damaged shards come back, whatever a store has been through: rows are compared by raw pyarrow and h5py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softlabel.cli.main import main
from softlabel.store.open import open_store
from softlabel.store.writer import Committer
from tests.support import format_reader
from tests.support.datasets import CLASSES, make_jpeg, write_parquet
from tests.support.teachers import write_teacher

Prepare = Callable[["Place"], None]


class Place:
    """A working folder with data and teachers, in which stores are made by the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Two growths, whose new samples lie between those that were there.
        for count, name in ((12, "small"), (17, "more"), (22, "most")):
            chosen = [n for n in range(22) if n * 7 % 22 < count]
            write(folder / f"{name}.parquet", chosen)
        write(folder / "other.parquet", list(range(100, 108)))
        for seed in range(3):
            write_teacher(folder / f"t{seed}.safetensors", seed=seed)

    def run(self, *arguments: object) -> None:
        assert main([str(one) for one in arguments]) == 0

    def generate(self, *options: object, data: str = "small", out: str = "s", teachers: tuple[int, ...] = (0,)) -> None:
        named = [f"zoo:resnet8@{self.folder}/t{seed}.safetensors" for seed in teachers]
        self.run(
            *("generate", "--data", self.folder / f"{data}.parquet", "--teacher", *named, "--out", out, "--shard-rows"),
            *(5, "--batch-size", 8, "--no-preflight", *options),
        )


def write(path: Path, numbers: list[int]) -> None:
    keys = [f"{n:03d}.jpg" for n in numbers]
    write_parquet(path, [make_jpeg(n) for n in numbers], keys=keys, labels=[n % len(CLASSES) for n in numbers])


VIEWS = ("--augment", "crop-flip", "--views")


def grown(at: Place) -> None:
    at.generate()
    at.generate("--grow", data="more")
    at.generate("--grow", data="most")


def more_views(at: Place) -> None:
    at.generate(*VIEWS, 1)
    at.generate(*VIEWS, 2)


def both(at: Place) -> None:
    at.generate(*VIEWS, 1)
    at.generate(*VIEWS, 2, "--grow", data="more")
    at.generate(*VIEWS, 3, "--grow", data="most")


def extended(at: Place) -> None:
    at.generate("--combine", "keep", "--format", "hdf5", teachers=(0, 1))
    at.generate("--combine", "keep", "--format", "hdf5", "--grow", data="more", teachers=(0, 1))
    at.run("extend", "s", "--teacher", f"zoo:resnet8@{at.folder}/t2.safetensors")


def head(at: Place) -> None:
    at.generate("--encoding", "head")
    at.generate("--encoding", "head", "--grow", data="most")


SAMPLED = ("--encoding", "sampled", "--samples", 5)


def drawn_before(at: Place) -> None:
    """A store of the time before systematic draws."""
    at.generate(*SAMPLED, "--draw", "independent")
    at.generate(*SAMPLED, "--grow", data="most")


def combined(at: Place) -> None:
    at.generate("--combine", "keep", out="kept", teachers=(0, 1, 2))
    at.run("combine", "kept", "s", "--members", 3, 1, "--weights", 0.3, 0.6, "--combine", "probs", "--temperature", 3)


def retempered(at: Place) -> None:
    at.generate(*VIEWS, 2, out="a")
    at.run("combine", "a", "s", "--temperature", 2)


def merged(at: Place) -> None:
    at.generate(out="a")
    at.generate("--grow", data="more", out="a")
    at.generate(data="other", out="b")
    at.run("merge", "a", "b", "--out", "s")


def converted(at: Place) -> None:
    merged(at)
    shutil.move("s", "m")
    at.run("convert", "m", "s", "--format", "hdf5", "--encoding", "int8", "--shard-rows", 4)


def sources_grew(at: Place) -> None:
    """Growth adds rows and changes none, so that those which were there are still the ones."""
    merged(at)
    at.generate("--grow", data="most", out="a")


def sources_extended(at: Place) -> None:
    at.generate("--combine", "keep", out="kept", teachers=(0, 1))
    at.run("combine", "kept", "s", "--weights", 0.3, 0.6)
    at.run("extend", "kept", "--teacher", f"zoo:resnet8@{at.folder}/t2.safetensors")


HISTORIES = [
    *(
        grown,
        more_views,
        both,
        extended,
        head,
        drawn_before,
        combined,
        retempered,
        merged,
        converted,
        sources_grew,
        sources_extended,
    )
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("repair"))


@pytest.fixture(scope="module")
def made(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Prepare, Path], None]:
    """Copies what a history leaves into the working folder; each is run once."""
    done: dict[Prepare, Path] = {}

    def copy(history: Prepare, to: Path) -> None:
        if history not in done:
            folder = done[history] = tmp_path_factory.mktemp(history.__name__)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                history(place)
        shutil.copytree(done[history], to, dirs_exist_ok=True)

    return copy


def lose(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 16
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [(lose, flip), (cut, lose)], ids=["first-lost", "last-lost"])
@pytest.mark.parametrize("history", HISTORIES)
def test_lost_and_damaged_shards_come_back(
    made: Callable[[Prepare, Path], None],
    history: Prepare,
    damage: tuple[Callable[[Path], None], ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(history, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = format_reader.read_store("s")
    manifest = json.loads(Path("s/manifest.json").read_text())
    files = sorted(Path("s/shards").iterdir())
    for hurt, path in zip(damage, (files[0], files[-1]), strict=True):
        hurt(path)
    if manifest["extra"]:
        flip(Path("s") / manifest["extra"][0]["file"])
    assert main(["verify", "s"]) == 3
    listed = capsys.readouterr().out
    assert all(path.name in listed for path in (files[0], files[-1]))
    assert listed.count("softlabel repair s'") == 2 + len(manifest["extra"])
    assert main(["repair", "s"]) == 0
    assert "2 shards" in capsys.readouterr().out
    assert main(["verify", "s"]) == 0
    after = format_reader.read_store("s")
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
    assert len(list(Path("s/shards").iterdir())) == len(files)
    kept = json.loads(Path("s/manifest.json").read_text())
    assert {name: kept[name] for name in ("run", "recorded", "store_id")} == {
        name: manifest[name] for name in ("run", "recorded", "store_id")
    }


def test_what_cannot_be_made_again_is_named_by_verify(
    made: Callable[[Prepare, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(converted, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = format_reader.read_store("s")
    shutil.move("m", "elsewhere")
    lose(sorted(Path("s/shards").iterdir())[1])
    assert main(["verify", "s"]) == 3
    assert "from m, but m does not exist: run 'softlabel repair s --source STORE'" in capsys.readouterr().out
    assert main(["repair", "s"]) == 2
    assert "m does not exist; give --source" in capsys.readouterr().err
    assert main(["repair", "s", "--source", "a"]) == 2
    assert "a is another store now" in capsys.readouterr().err
    assert main(["repair", "s", "--data", "digits"]) == 2
    assert "--data: s was made from other stores" in capsys.readouterr().err
    assert main(["repair", "s", "--source", "elsewhere"]) == 0
    after = format_reader.read_store("s")
    np.testing.assert_array_equal(after["scaled_logits"], before["scaled_logits"])


def test_what_teachers_cannot_do_to_a_store_is_refused_and_leaves_it_whole(
    made: Callable[[Prepare, Path], None],
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(merged, tmp_path)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "all.parquet", [*range(22), *range(100, 108)])
    spec = f"zoo:resnet8@{place.folder}/t0.safetensors"
    again = ["generate", "--data", "all.parquet", "--teacher", spec, "--shard-rows", "5", "--no-preflight", "--grow"]
    assert main([*again, "--out", "s"]) == 2
    assert "into another folder and merge the two" in capsys.readouterr().err
    assert main(["verify", "s"]) == 0
    with Committer.open("s", open_store("s").run, relabel=(0,)):
        pass
    assert main(["convert", "s", "c", "--encoding", "int8"]) == 2
    assert "run the same 'softlabel merge' again" in capsys.readouterr().err
    # What another extension left beside a store.
    place.generate("--combine", "keep", out="kept")
    shutil.copytree("kept", "kept.extending")
    assert main(["extend", "kept", "--teacher", spec.replace("t0", "t1")]) == 2
    assert (
        "kept.extending is of an interrupted 'softlabel extend': give its teacher to finish it, or remove the folder"
        in capsys.readouterr().err
    )


def test_lost_records_and_an_interrupted_repair(
    made: Callable[[Prepare, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    """Segments are found again from the shards, and what a repair leaves undone, `generate` finishes too."""
    made(grown, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = format_reader.read_store("s")
    for path in Path("s/segments").iterdir():
        path.unlink()
    assert main(["verify", "s"]) == 3
    assert main(["repair", "s"]) == 0
    run = open_store("s").run
    with Committer.open("s", run, relabel=(0, 3, run.shard_count - 1)):
        pass  # forgotten, and killed before anything was made again
    place.generate("--grow", data="most")
    after = format_reader.read_store("s")
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
