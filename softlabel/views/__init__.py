"""Augmented views: one implementation for teacher and student, deterministic in (seed, key, view).

*Drawing* turns (seed, key, view) into explicit parameters (crop box, mirroring, mixing partner), independent of batch,
worker and order. *Making* applies them to uint8 RGB pixels before normalisation: teachers and students that normalise
differently get the same pixels.
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
