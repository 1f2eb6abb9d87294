"""From a SPEC to a network with weights, for teachers and students alike: a file for each kind.

Nothing that a checkpoint contains is executed: safetensors, `torch.load(weights_only=True)`, ONNX. A .pt2 file, which
torch cannot read in such a way, has to be trusted by name.
"""

from softlabel.models.build import Network, build_model, build_network, own_preprocessing, refuse_random
from softlabel.models.from_hf import class_names_of, refuse_other_heads
from softlabel.models.from_torchvision import published_weights, torchvision_weights
from softlabel.models.language_model import LanguageModel, check_packing, measure_leak
from softlabel.models.program import Program, logits_of, refuse_precision
from softlabel.models.runs import RunModel, names_language_model, network_of, read_run, save_run
from softlabel.models.weights import load_weights, weights_sha256

__all__ = [
    "LanguageModel",
    "Network",
    "Program",
    "RunModel",
    "build_model",
    "build_network",
    "check_packing",
    "class_names_of",
    "load_weights",
    "logits_of",
    "measure_leak",
    "names_language_model",
    "network_of",
    "own_preprocessing",
    "published_weights",
    "read_run",
    "refuse_other_heads",
    "refuse_precision",
    "refuse_random",
    "save_run",
    "torchvision_weights",
    "weights_sha256",
]
