"""Versions of the libraries that decode and transform images: pixels depend on them."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import PIL
import simplejpeg
import torch
from PIL import features


def libraries() -> dict[str, str]:
    """Return name -> version of every library that may change pixels."""
    found = {
        "torch": torch.__version__,
        "torchvision": _find_torchvision(),
        "Pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    turbo = features.version_feature("libjpeg_turbo")
    found["libjpeg-turbo" if turbo else "libjpeg"] = turbo or features.version_codec("jpg") or "none"
    return {name: str(version) for name, version in found.items()}


def changed(recorded: object) -> str:
    """Return in words which versions differ from the recorded ones."""
    then = recorded if isinstance(recorded, dict) else {}
    now = libraries()
    names = [name for name in now if name != "cpu"] + ["cpu"]
    others = [
        f"{name} is {now.get(name, 'absent')} now, {then[name]} when the store was written"
        for name in dict.fromkeys([*names, *(name for name in then if name.startswith("libjpeg"))])
        if name in then and then[name] != now.get(name, "absent")
    ]
    return ", ".join(others) if others else "all recorded libraries have the same versions here"


@cache
def _find_torchvision() -> str:
    """Return `torchvision.__version__`, whose import takes longer than torch's, from the file that sets it."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "a dependency"
    assert spec.origin is not None, "not a namespace package"
    found = re.search(r"^__version__ = ['\"](.+)['\"]$", Path(spec.origin).with_name("version.py").read_text(), re.M)
    assert found is not None, "as torchvision's own setup.py writes it"
    return found[1]
