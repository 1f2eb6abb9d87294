"""What a view of an image is: drawn from (seed, key, view) alone, then made by one implementation for both stages.

A view is two steps. *Drawing* turns (seed, key, view) into explicit parameters (where the crop lies, whether it is
mirrored, with whom it is mixed), so that a sample's view does not depend on the batch, the worker or the order in which
it is met. *Making* takes the parameters and the pixels, uint8, in RGB, before any normalisation: teachers and students
that normalise differently see the same pixels.
"""

from softlabel.views.apply import Made, Views, digests, stacked
from softlabel.views.crop_flip import CropFlip, Crops
from softlabel.views.mix_ops import identity
from softlabel.views.policy import CENTER, Policy, parse_policy, view_policy
from softlabel.views.random import draw
from softlabel.views.versions import changed, libraries

__all__ = [
    "CENTER",
    "CropFlip",
    "Crops",
    "Made",
    "Policy",
    "Views",
    "changed",
    "digests",
    "draw",
    "identity",
    "libraries",
    "parse_policy",
    "stacked",
    "view_policy",
]
