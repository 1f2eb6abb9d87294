"""Learning rates against torch's own schedulers."""

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from softlabel import TrainConfig
from softlabel.errors import UsageError
from softlabel.training.schedule import learning_rate


def given(**options: object) -> TrainConfig:
    return TrainConfig(data="d", student="zoo:resnet8", out="o", **options)  # type: ignore[arg-type]


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def test_step_equals_multi_step() -> None:
    config = given(schedule="step", epochs=6, warmup_epochs=0, lr_drops=[2, 4.5], lr_factor=0.2)
    expected = rates(MultiStepLR(optimizer(0.3), [20, 45], gamma=0.2), 60)
    assert [learning_rate(config, 0.3, step, 10) for step in range(60)] == pytest.approx(expected)
    halves = given(schedule="step", epochs=4, warmup_epochs=0)
    assert [learning_rate(halves, 1.0, step, 4) for step in (0, 7, 8, 11, 12, 15)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_one_cycle_equals_torch_s() -> None:
    config = given(schedule="one-cycle", epochs=5)
    expected = rates(OneCycleLR(optimizer(0.2), 0.2, total_steps=51), 50)
    # torch's last step is never taken; with one step more both are the same curve.
    config_51 = [learning_rate(config, 0.2, step, 51 / 5) for step in range(50)]  # type: ignore[arg-type]
    assert config_51 == pytest.approx(expected, rel=1e-9)


def test_constant_and_warm_up() -> None:
    config = given(schedule="constant", epochs=3, warmup_epochs=1)
    found = [learning_rate(config, 1.0, step, 4) for step in range(12)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 8])


def test_options_of_other_schedules_are_refused() -> None:
    with pytest.raises(UsageError, match="only schedule step has drops"):
        given(lr_drops=[1.0])
    with pytest.raises(UsageError, match="one-cycle rises by itself"):
        given(schedule="one-cycle", warmup_epochs=1)
