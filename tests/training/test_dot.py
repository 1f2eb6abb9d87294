"""The optimiser that keeps the gradients of the soft and of the hard term apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from softlabel import SoftLabelLoader, train
from softlabel.errors import UsageError
from softlabel.inputs.base import Inputs
from softlabel.models import build_model
from softlabel.models.teacher import student_preprocessing
from softlabel.training.dot import Dot
from tests.support.training_runs import (
    ROWS,
    make_config,
    make_settings,
    read_weights,
    train_in_ranks,
    write_digits,
)

SMOOTH = "python:tests.support.students:build_smooth_student?resize=16&crop=16"
REST = {"student": SMOOTH, "epochs": 2, "batch_size": 31, "lr": 0.003, "optimizer": "dot"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def test_the_optimiser_is_that_of_the_paper() -> None:
    """Its reference code line by line: the hard gradient has the weight decay, and each its momentum."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    gradients = torch.randn(6, 2, 5, generator=generator, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Dot([weight], lr=0.1, momentum=0.9, weight_decay=0.01, delta=0.05)
    expected, hard_buffer, soft_buffer = start.clone(), None, None
    for number, (hard, soft) in enumerate(gradients):
        if number == 3:  # as a run that goes on
            state, optimizer = optimizer.state_dict(), Dot([weight], lr=0.1)
            optimizer.load_state_dict(state)
        optimizer.add_hard([hard / 2])
        optimizer.add_hard([hard / 2])
        weight.grad = hard + soft
        optimizer.step()
        task = hard + 0.01 * expected
        hard_buffer = task if hard_buffer is None else 0.85 * hard_buffer + task
        soft_buffer = soft if soft_buffer is None else 0.95 * soft_buffer + soft
        expected = expected - 0.1 * hard_buffer - 0.1 * soft_buffer
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_with_equal_momenta_it_is_sgd() -> None:
    weights = [torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2)]
    optimizers = [
        Dot(weights[:1], lr=0.1, momentum=0.8, weight_decay=0.1, delta=0.0),
        torch.optim.SGD(weights[1:], lr=0.1, momentum=0.8, weight_decay=0.1),
    ]
    for _ in range(4):
        hard, soft = torch.randn(2, 4, dtype=torch.float64)
        optimizers[0].add_hard([hard])  # type: ignore[attr-defined]
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = hard + soft
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


def test_a_run_has_both_gradients(digits: Path, tmp_path: Path) -> None:
    """Three steps of the whole data, by hand."""
    plain = {"augment": "none", "schedule": "constant", "warmup_epochs": 0, "weight_decay": 0.0, "epochs": 3}
    train(make_config(digits, tmp_path / "run", **{**REST, "batch_size": ROWS, "lr": 0.05, **plain}))
    transform = student_preprocessing(SMOOTH)
    loader = SoftLabelLoader(
        digits / "data.parquet", digits / "store", batch_size=ROWS, shuffle=False, preprocessing=transform
    )
    batch = next(iter(loader))
    loader.close()
    torch.manual_seed(0)
    network = build_model(SMOOTH, num_classes=10)
    parameters = list(network.parameters())
    hard_buffer, soft_buffer = ([torch.zeros_like(one) for one in parameters] for _ in range(2))
    for _ in range(3):
        logits_BC = transform.finish(Inputs.of(batch.inputs)).call(network)
        hard = 0.1 * torch.nn.functional.cross_entropy(logits_BC, batch.labels)
        p_BC = torch.softmax(batch.target.scaled_logits.float(), 1)
        soft = 0.9 * 16 * torch.nn.functional.kl_div((logits_BC / 4).log_softmax(1), p_BC, reduction="batchmean")
        of_hard, of_soft = (torch.autograd.grad(one, parameters, retain_graph=True) for one in (hard, soft))
        with torch.no_grad():
            for number, one in enumerate(parameters):
                hard_buffer[number] = 0.825 * hard_buffer[number] + of_hard[number]
                soft_buffer[number] = 0.975 * soft_buffer[number] + of_soft[number]
                one -= 0.05 * (hard_buffer[number] + soft_buffer[number])
    found = read_weights(tmp_path / "run")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_parts_and_processes_add_up_to_the_batch(digits: Path, tmp_path: Path) -> None:
    rest = {**REST, "loss": ["kd", "dist"]}
    train(make_config(digits, tmp_path / "one", **rest))
    train_in_ranks(make_settings(digits, tmp_path / "two", accumulate=2, **rest), ranks=2)
    for loss in ("kd", "dist"):
        for name, value in read_weights(tmp_path / "one" / loss).items():
            np.testing.assert_allclose(
                value.numpy(), read_weights(tmp_path / "two" / loss)[name].numpy(), rtol=2e-3, atol=2e-4
            )


def test_what_it_cannot_do_is_named(digits: Path, tmp_path: Path) -> None:
    for name, value in (("clip_norm", 1.0), ("compile", True)):
        with pytest.raises(UsageError, match=f"{name}: is of one gradient a step"):
            make_config(digits, tmp_path, **REST, **{name: value})
    with pytest.raises(UsageError, match=r"momentum: dot has 0.075 more and less"):
        make_config(digits, tmp_path, **REST, momentum=0.95)
    for changes in ({"hard_weight": 0.0}, {"labels": None}, {"loss": "mse"}):
        with pytest.raises(
            UsageError, match="optimizer: dot keeps the gradients of the soft and of the hard term apart"
        ):
            train(make_config(digits, tmp_path, **{**REST, "batch_size": ROWS, **changes}))
    with pytest.raises(UsageError, match=r"stack: .*optimizer dot needs the gradients of two terms"):
        train(make_config(digits, tmp_path / "stack", **{**REST, "lr": [0.001, 0.01]}, stack="on"))
    with pytest.raises(UsageError, match="optimizer: dot needs the gradients of the soft and of the hard term apart"):
        train(make_config(digits, tmp_path, **{**REST, "student": "lm:nowhere", "batch_size": None}, pack=8))
