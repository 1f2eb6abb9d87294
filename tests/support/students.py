"""Student networks for tests of training, named in SPECs as `python:tests.support.students:NAME`."""

from torch import Tensor, nn


def build_dropout_student(num_classes: int) -> nn.Module:
    """A student whose steps draw random numbers, which a resumed run has to draw again."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, num_classes)
    )


def build_smooth_student(num_classes: int) -> nn.Module:
    """Without kinks or batch norm, so that rounding errors stay as small as they are."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.Tanh(), nn.Linear(32, num_classes))


def build_three_class_student() -> nn.Module:
    """A student that does not ask how many classes there are."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))


def build_table_student(num_classes: int, inputs: int) -> nn.Module:
    """A linear layer over the columns of a table."""
    return nn.Linear(int(inputs), num_classes)


class _Double(nn.Module):
    def __init__(self, num_classes: int, *, statistics: bool) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(8, track_running_stats=statistics) for _ in range(2)]
        features = (nn.Conv2d(3, 8, 3, stride=2), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), norms[1])
        self.network = nn.Sequential(*features, nn.Flatten(), nn.Linear(200, num_classes)).double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.double())
        return logits


def build_double_student(num_classes: int) -> nn.Module:
    """A student that computes in float64, so that rounding explains no difference that a test could see."""
    return _Double(num_classes, statistics=True)


def build_batchwise_student(num_classes: int) -> nn.Module:
    """The same without running statistics: it always normalises by the batch."""
    return _Double(num_classes, statistics=False)


class _Branching(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1))
        return logits if logits.sum() > 0 else 2 * logits


def build_branching_student(num_classes: int) -> nn.Module:
    """A student whose path depends on the values that it computes."""
    return _Branching(num_classes)


class _Counting(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(3 * 16 * 16, num_classes), 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.linear(images.flatten(1))
        return logits * (1 + self.calls)


def build_counting_student(num_classes: int) -> nn.Module:
    """A student with a state that is no tensor."""
    return _Counting(num_classes)
