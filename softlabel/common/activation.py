"""What turns a network's outputs into probabilities."""

from typing import Literal

# Over the classes of a row, or of each class by itself.
Activation = Literal["softmax", "sigmoid"]
