"""What pixels depend on beside the image: the libraries that decode and transform it."""

import PIL
import torch
import torchvision
from PIL import features


def libraries() -> dict[str, str]:
    """Name -> version of everything that may change what comes out of an image."""
    found = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Pillow": PIL.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    turbo = features.version_feature("libjpeg_turbo")
    found["libjpeg-turbo" if turbo else "libjpeg"] = turbo or features.version_codec("jpg") or "none"
    return {name: str(version) for name, version in found.items()}


def changed(recorded: object) -> str:
    """Which of them are others here than where they were recorded, in words."""
    then = recorded if isinstance(recorded, dict) else {}
    now = libraries()
    names = [name for name in now if name != "cpu"] + ["cpu"]
    others = [
        f"{name} is {now.get(name, 'absent')} here and was {then[name]} there"
        for name in dict.fromkeys([*names, *(name for name in then if name.startswith("libjpeg"))])
        if name in then and then[name] != now.get(name, "absent")
    ]
    return ", ".join(others) if others else "no library that was recorded has another version here"
