"""Which samples and views training loops of other libraries see, epoch after epoch and after a resume.

The reference is the loader with `set_epoch` called each epoch, iterated to its end. The loops take `len(loader)`
batches and leave the iterator, as Lightning, the Trainer and every `next()` loop do.
"""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import softlabel
from softlabel.errors import UsageError
from softlabel.loader import Batch, SoftLabelLoader
from tests.support.datasets import make_jpeg, write_parquet
from tests.support.teachers import make_pixel_teacher_spec

ROWS, BATCH, STEPS, EPOCHS = 25, 10, 2, 4
Seen = list[tuple[str, int]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], SoftLabelLoader]:
    """Loaders of 25 images in three views, five of which do not fit into the two batches of an epoch."""
    folder = tmp_path_factory.mktemp("loops")
    data = write_parquet(folder / "data.parquet", [make_jpeg(number) for number in range(ROWS)])
    softlabel.generate(
        data, teachers=[make_pixel_teacher_spec(32)], out=folder / "store", views=3, augment="crop-flip", progress=False
    )
    return lambda: SoftLabelLoader(data, folder / "store", batch_size=BATCH, tail="drop", ignore_labels=True)


@pytest.fixture(scope="module")
def expected(make: Callable[[], SoftLabelLoader]) -> list[Seen]:
    """What each step has to see."""
    loader, steps = make(), []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        steps += [look(loader, batch) for batch in loader]
    seen = set(itertools.chain(*steps))
    assert {view for _, view in seen} == {0, 1, 2}
    assert len({key for key, _ in seen}) == ROWS
    assert len(steps) == EPOCHS * STEPS
    return steps


def look(loader: SoftLabelLoader, batch: Batch) -> Seen:
    return list(zip(batch.keys, loader.store.take(batch.rows.numpy()).views.tolist(), strict=True))  # type: ignore[union-attr]


class Student(nn.Module):
    """Something to optimise, that keeps what it was shown."""

    def __init__(self, loader: SoftLabelLoader) -> None:
        super().__init__()
        self.weight, self.loader, self.steps = nn.Parameter(torch.zeros(1)), loader, []

    def forward(self, batch: Batch) -> torch.Tensor:
        self.steps.append(look(self.loader, batch))
        return (self.weight**2).sum()


# A loop: trains a student over all epochs and saves after every step, or goes on after so many; returns what it saw.
Loop = Callable[[SoftLabelLoader, Path, int], list[Seen]]


def bare(loader: SoftLabelLoader, folder: Path, done: int) -> list[Seen]:
    if done:
        loader.load_state_dict(torch.load(folder / f"{done}.pt"))
    seen = []
    for _ in range(done // STEPS, EPOCHS):
        batches = iter(loader)
        for _ in range(done % STEPS, STEPS):
            seen.append(look(loader, next(batches)))
            done += 1
            torch.save(loader.state_dict(), folder / f"{done}.pt")
    return seen


def in_lightning(loader: SoftLabelLoader, folder: Path, done: int) -> list[Seen]:
    lightning = pytest.importorskip("lightning", reason="needs the extra 'lightning'")
    student = Student(loader)

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            return student(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(student.parameters(), lr=0.1)

    class Save(lightning.Callback):  # type: ignore[name-defined,misc]
        """In the middle of an epoch after a step, at its end when it has ended; and there also after the step."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            end = trainer.global_step % STEPS == 0
            trainer.save_checkpoint(folder / f"{trainer.global_step}{'-step' if end else ''}.ckpt")

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[Save()], **quiet,
    )  # fmt: skip
    after_step = folder / f"{done}-step.ckpt"
    saved = after_step if done == 2 * STEPS else folder / f"{done}.ckpt"
    trainer.fit(Module(), loader, ckpt_path=saved if done else None, weights_only=True if done else None)
    return student.steps


def in_accelerate(loader: SoftLabelLoader, folder: Path, done: int) -> list[Seen]:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    student = Student(loader)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    model, optimizer, batches = accelerator.prepare(student, optimizer, loader)
    accelerator.register_for_checkpointing(batches)
    if done:
        accelerator.load_state(folder / str(done))
    for _ in range(done // STEPS, EPOCHS):
        for batch in itertools.islice(batches, STEPS - done % STEPS):
            accelerator.backward(model(batch.to(accelerator.device)))
            optimizer.step()
            done += 1
            accelerator.save_state(folder / str(done))
    return student.steps


def with_skipped_batches(loader: SoftLabelLoader, folder: Path, done: int) -> list[Seen]:
    """As the examples of accelerate resume: skip in the first epoch, then go on with the loader."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    if done:
        loader.set_epoch(done // STEPS)
    seen = []
    for _ in range(done // STEPS, EPOCHS):
        batches = accelerate.skip_first_batches(loader, done % STEPS) if done % STEPS else loader
        for batch in batches:
            seen.append(look(loader, batch))
            done += 1
    return seen


def in_the_trainer(loader: SoftLabelLoader, folder: Path, done: int) -> list[Seen]:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    student = Student(loader)

    class Mine(transformers.Trainer):  # type: ignore[name-defined,misc]
        def get_train_dataloader(self) -> Any:
            return loader

        def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> torch.Tensor:
            return model(inputs.to(self.args.device))

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, save_strategy="steps", save_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.1, logging_strategy="no",
    )  # fmt: skip
    trainer = Mine(model=student, args=arguments, train_dataset=loader.dataset)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{done}") if done else None)
    return student.steps


@pytest.mark.parametrize("loop", [bare, in_lightning, in_accelerate, with_skipped_batches, in_the_trainer])
def test_a_loop_sees_every_epoch_and_resumes(
    loop: Loop, make: Callable[[], SoftLabelLoader], expected: list[Seen], tmp_path: Path
) -> None:
    assert loop(make(), tmp_path, 0) == expected
    for done in (STEPS, STEPS + 1, 2 * STEPS):  # at the end of an epoch, and within one
        assert loop(make(), tmp_path, done) == expected[done:], f"resumed after {done} steps"


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_left_is_the_epoch_before(make: Callable[[], SoftLabelLoader], workers: int) -> None:
    class Numbers(Dataset[np.ndarray]):
        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: int) -> np.ndarray:
            return np.full((2, 2, 3), index, dtype=np.uint8)

    loader = SoftLabelLoader(Numbers(), batch_size=BATCH, workers=workers)
    epochs = [[batch.keys for batch in loader] for _ in range(3)]
    loader.set_epoch(0)
    # Each iteration is left after two of three batches; a look at one is no exception, and can be taken back.
    assert [[batch.keys for batch in itertools.islice(loader, 2)] for _ in range(3)] == [keys[:2] for keys in epochs]
    loader.set_epoch(0)
    assert next(iter(loader)).keys == epochs[0][0]
    loader.set_epoch(0)
    older, newer = iter(loader), iter(loader)
    assert next(older).keys == epochs[0][0]
    assert next(newer).keys == epochs[1][0]
    with pytest.raises(UsageError, match="iteration of epoch 0 was ended after 1 of 3 batches by a newer one"):
        next(older)
    assert [batch.keys for batch in newer] == epochs[1][1:]
    loader.close()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_copy_goes_on_by_itself(make: Callable[[], SoftLabelLoader], again: Any, streaming: bool) -> None:
    first = make()
    loader = SoftLabelLoader(
        first.source, first.store, batch_size=BATCH, tail="drop", streaming=streaming, ignore_labels=True, workers=1
    )
    expected = [[look(loader, batch) for batch in loader] for _ in range(2)]
    loader.set_epoch(0)
    batches: Iterator[Batch] = iter(loader)
    next(batches)
    other = again(loader)
    assert [look(other, batch) for batch in other] == expected[0][1:]
    assert [look(loader, batch) for batch in batches] == expected[0][1:]
    assert [look(other, batch) for batch in other] == expected[1]
    assert all(batch.target is not None for batch in again(other))
    loader.close()
    other.close()
