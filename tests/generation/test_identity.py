"""No label reaches another image, whatever form the images have and whatever their keys are: here all keys are numbers.

Every place that has both an image and a row is given the labelled images, and then others under the same keys.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

import softlabel
from softlabel.cli.main import main
from softlabel.errors import MismatchError, SoftLabelError
from softlabel.generation.reload import config_of, reload_job
from softlabel.maintain.audit import recompute
from softlabel.maintain.coverage import coverage
from softlabel.maintain.extend import extend
from tests.support.stores import write_logits
from tests.support.teachers import write_teacher

ROWS, SIDE = 12, 8
PIXELS = np.random.default_rng(3).integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8)
REVERSED = np.ascontiguousarray(PIXELS[::-1])


class Pictures:
    """A map-style dataset of PIL images, all of one class or of none."""

    def __init__(self, pixels: np.ndarray, label: int | None = None) -> None:
        self.pixels, self.label = pixels, label

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        image = Image.fromarray(self.pixels[index])
        return image if self.label is None else (image, self.label)


def hugging_face(pixels: np.ndarray) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets")
    images = [Image.fromarray(one) for one in pixels]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def npy(pixels: np.ndarray, folder: Path) -> str:
    np.save(folder / "a.npy", pixels)
    return str(folder / "a.npy")


FORMS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "PIL images": lambda pixels, folder: Pictures(pixels),
    "one class": lambda pixels, folder: Pictures(pixels, label=2),
    "Hugging Face": lambda pixels, folder: hugging_face(pixels),
    "Hugging Face subset": lambda pixels, folder: Subset(hugging_face(pixels), range(ROWS)),
    "array": npy,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t.safetensors") + "?resize=none&crop=none"


def label(data: Any, out: Path, teacher: str, **options: Any) -> Path:
    softlabel.generate(data, teachers=[teacher], out=out, device="cpu", preflight=False, shard_rows=5, **options)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_other_images_under_the_same_keys_are_refused(form: str, tmp_path: Path, teacher: str) -> None:
    (tmp_path / "other").mkdir()
    data, other = FORMS[form](PIXELS, tmp_path), FORMS[form](REVERSED, tmp_path / "other")
    store = label(data, tmp_path / "store", teacher, combine="keep")
    opened = softlabel.open_store(store)
    assert len(set(opened.content.tolist())) == ROWS

    def loader(data: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("softlabel.loader.dataset._COMPARED", 0)  # what the first look misses
            for batch in softlabel.SoftLabelLoader(data, store, batch_size=5, cache_mb=0):
                assert [PIXELS[int(key)].tobytes() for key in batch.keys] == [
                    image.permute(1, 2, 0).numpy().tobytes() for image in batch.inputs
                ]

    def audit(data: Any) -> None:
        found = coverage(opened, data, progress=False)
        assert (found.compared, found.unknown) == (ROWS, None)
        if not found.ok:
            raise MismatchError(f"{found.changed_count} changed")

    def first_look(data: Any) -> None:
        softlabel.SoftLabelLoader(data, store)

    def resume(data: Any) -> None:
        label(data, store, teacher, combine="keep")

    def ask_again(data: Any) -> None:
        config = replace(config_of(opened.manifest), device="cpu")
        found = recompute(opened, reload_job(opened.manifest, store, config, data=data, teachers=[teacher]), 5)
        assert found.worst_difference < 1e-2

    def evaluate(data: Any) -> None:
        softlabel.evaluate(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE**2, 4)), data, store)

    def view(data: Any) -> None:
        label(data, tmp_path / "views", teacher, augment="crop-flip?padding=1", views=1 if data is first else 2)

    def add(data: Any) -> None:
        extend(
            store, teacher=write_teacher(tmp_path / "second.safetensors", seed=5) + "?resize=none&crop=none", data=data
        )

    first = data
    places = [first_look, loader, audit, resume, ask_again, evaluate, view]
    for place in [*places, add] if form == "array" else places:  # extend takes a SOURCE alone
        if place is not add:  # which would change the store
            place(data)
        with pytest.raises(SoftLabelError, match=r"not the one|differs from|12 changed"):
            place(other)
    if form == "array":
        add(data)


def test_a_shuffled_hugging_face_dataset_and_a_part_of_it(tmp_path: Path, teacher: str) -> None:
    data = hugging_face(PIXELS)
    store = label(data, tmp_path / "store", teacher)
    for other in (data.shuffle(seed=1), data.select(range(1, 8)), Subset(data, [4, 5])):
        with pytest.raises(MismatchError, match="is not the one that was labelled"):
            softlabel.SoftLabelLoader(other, store)
    # A transform of the user's is what the images are then: read with it, and not behind it.
    seen = data.with_transform(lambda rows: {"image": [one.rotate(180) for one in rows["image"]]})
    (sample,) = softlabel.open_source(seen).read([0])
    assert np.array_equal(np.asarray(sample.raw), PIXELS[0, ::-1, ::-1])


def test_the_command_line_on_an_array_and_its_reverse(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "b.npy", REVERSED)
    store = label(npy(PIXELS, tmp_path), tmp_path / "store", teacher)
    assert main(["verify", str(store), "--data", str(tmp_path / "a.npy")]) == 0
    assert f"{ROWS} of them compared by content" in capsys.readouterr().out
    assert main(["verify", str(store), "--data", str(tmp_path / "b.npy")]) == 3
    assert f"{ROWS} samples differ from the labelled ones: 0, 1, 2" in capsys.readouterr().out
    arguments = ["evaluate", "--model", teacher, "--data", str(tmp_path / "b.npy"), "--labels", str(store)]
    assert main([*arguments, "--device", "cpu"]) == 2
    assert "sample '0' is not the one that was labelled" in capsys.readouterr().err


def test_stores_without_hashes_and_of_files_say_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    keys, logits_NC = [str(index) for index in range(ROWS)], np.zeros((ROWS, 4), np.float32)
    write_logits(tmp_path / "old", keys, logits_NC)
    files = [one.tobytes() for one in PIXELS]  # as good as files, here
    write_logits(tmp_path / "files", keys, logits_NC, images=files)
    data = npy(PIXELS, tmp_path)
    for store, reason in (
        ("old", "no content hash"),
        ("files", "labelled from files.*these are pixels"),
    ):
        caplog.clear()
        assert len(list(softlabel.SoftLabelLoader(data, tmp_path / store, batch_size=ROWS))) == 1
        assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 1
        assert re.search(f"{ROWS} of {ROWS} (samples|images) cannot be compared.*{reason}", caplog.text)
        assert main(["verify", str(tmp_path / store), "--data", data]) == 3
        printed = capsys.readouterr().out
        assert f"{ROWS} cannot be compared: it was " in printed
        assert "nothing was compared" in printed


def test_label_join_compares_the_images_that_it_is_given(tmp_path: Path, teacher: str) -> None:
    store = label(npy(PIXELS, tmp_path), tmp_path / "store", teacher)
    join = softlabel.LabelJoin(store, key="name", image="picture")
    batch = {"name": ["3", "0"], "picture": [Image.fromarray(PIXELS[3]), torch.from_numpy(PIXELS[0]).permute(2, 0, 1)]}
    assert len(join(batch)["target"].scaled_logits) == 2
    assert len(join.columns(batch)["soft_logits"]) == 2
    for join_again in (join, join.columns):
        with pytest.raises(MismatchError, match=r"sample '3' is not the one that was labelled.*2 of 2 in its batch"):
            join_again({**batch, "name": ["0", "3"][::-1], "picture": batch["picture"][::-1]})
