"""Student networks for tests of training, named in SPECs as `python:tests.support.students:NAME`."""

from torch import nn


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
