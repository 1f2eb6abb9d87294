"""Every number of an evaluation against a formula written down here, in numpy, or scikit-learn's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.utils.data import Dataset

import softlabel
from softlabel.errors import MismatchError
from softlabel.evaluation.metrics import calibration_error
from tests.support.stores import draw_logits, write_logits

CLASSES = 7


class Indices(Dataset[tuple[np.ndarray, int]]):
    """Images that carry their own index in their pixels."""

    def __init__(self, labels: NDArray[np.int64]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((2, 2, 3), index, dtype=np.uint8), int(self.labels[index])


class Lookup(nn.Module):
    """A model whose logits are a table; fails if it is asked in training mode."""

    def __init__(self, logits_NC: NDArray[np.float32]) -> None:
        super().__init__()
        self.register_buffer("table", torch.from_numpy(logits_NC))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        assert not self.training
        return self.table[(images_BCHW[:, 0, 0, 0] * 255).round().long()]


def expected_calibration_error(probs_NC: NDArray[np.float64], labels: NDArray[np.int64], bins: int = 15) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    confidence, right = probs_NC.max(axis=1), probs_NC.argmax(axis=1) == labels
    total = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("batch_size", [7, 256])
def test_against_numpy_and_scikit_learn(tmp_path: Path, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 200)
    logits_NC = draw_logits(200, CLASSES, seed=1)
    logits_NC[np.arange(200), labels] += 5
    teacher_NC = draw_logits(200, CLASSES, seed=2)
    teacher_NC[np.arange(200), labels] += 7
    temperature = 3.0
    order = rng.permutation(200)
    write_logits(tmp_path / "store", [str(i) for i in order], teacher_NC[order], temperature=temperature)
    found = softlabel.evaluate(
        Lookup(logits_NC), Indices(labels), tmp_path / "store", batch_size=batch_size, device="cpu"
    )

    probs_NC = softmax(logits_NC.astype(np.float64), axis=1)
    assert (found.samples, found.labelled, found.with_teacher) == (200, 200, 200)
    assert found.accuracy == pytest.approx(accuracy_score(labels, probs_NC.argmax(axis=1)))
    assert found.cross_entropy == pytest.approx(log_loss(labels, probs_NC, labels=range(CLASSES)), rel=1e-6)
    assert found.calibration_error == pytest.approx(expected_calibration_error(probs_NC, labels), rel=1e-6)
    assert found.agreement == pytest.approx((logits_NC.argmax(axis=1) == teacher_NC.argmax(axis=1)).mean())
    assert found.teacher_accuracy == pytest.approx((teacher_NC.argmax(axis=1) == labels).mean())
    log_p, log_q = (log_softmax(z.astype(np.float64) / temperature, axis=1) for z in (teacher_NC, logits_NC))
    # The store holds float16.
    assert found.teacher_kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean(), rel=2e-3)
    assert found.temperature == temperature
    assert f"{found.accuracy:.4f}" in str(found)
    assert found.to_dict()["agreement"] == found.agreement


def test_unlabelled_images_count_for_the_teacher_alone(tmp_path: Path) -> None:
    labels = np.array([0, 1, -100, -100, 2])
    logits_NC = draw_logits(5, CLASSES)
    write_logits(tmp_path / "store", [str(i) for i in range(4)], logits_NC[:4])
    found = softlabel.evaluate(
        Lookup(logits_NC), Indices(labels), tmp_path / "store", missing="hard-only", device="cpu"
    )
    right = logits_NC.argmax(axis=1) == labels
    assert (found.samples, found.labelled, found.with_teacher) == (5, 3, 4)
    assert found.accuracy == pytest.approx(right[[0, 1, 4]].mean())
    assert found.agreement == 1.0
    assert found.teacher_kl == pytest.approx(0.0, abs=1e-5)
    assert found.teacher_accuracy == pytest.approx(right[:2].mean())
    nothing = softlabel.evaluate(Lookup(logits_NC), Indices(np.full(5, -100)), device="cpu")
    assert (nothing.accuracy, nothing.cross_entropy, nothing.calibration_error) == (None, None, None)
    assert (nothing.agreement, nothing.teacher_kl) == (None, None)


def test_calibration_error_of_known_cases() -> None:
    sure_and_right = calibration_error(torch.ones(10), torch.ones(10, dtype=torch.bool))
    assert sure_and_right == 0.0
    assert calibration_error(torch.full((10,), 0.9), torch.arange(10) < 5) == pytest.approx(0.4)
    # On an edge: 0.2 belongs to (2/15, 3/15], with 0.19, and not to the bin above, with 0.21.
    confidence = torch.tensor([0.2, 0.19, 0.21], dtype=torch.float64)
    correct = torch.tensor([True, False, False])
    assert calibration_error(confidence, correct) == pytest.approx((abs(1 - 0.39) + 0.21) / 3)


def test_the_model_is_left_in_its_mode_and_has_to_fit(tmp_path: Path) -> None:
    model = Lookup(draw_logits(4, CLASSES)).train()
    softlabel.evaluate(model, Indices(np.zeros(4, dtype=np.int64)), device="cpu")
    assert model.training
    with pytest.raises(MismatchError, match="7 classes, the data has label 9"):
        softlabel.evaluate(model, Indices(np.array([9, 0, 0, 0])), device="cpu")
    write_logits(tmp_path / "store", list("0123"), draw_logits(4, CLASSES + 1))
    with pytest.raises(MismatchError, match="7 classes, the store has 8"):
        softlabel.evaluate(model, Indices(np.zeros(4, dtype=np.int64)), tmp_path / "store", device="cpu")
