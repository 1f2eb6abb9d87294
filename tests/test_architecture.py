"""The packages and who may import whom, no circle between files, and what stays out of `import softlabel`."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import softlabel

PACKAGE = Path(softlabel.__file__).parent


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@lru_cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = file
    return names


def test_files_stay_readable() -> None:
    long = {str(f.relative_to(PACKAGE)): n for f in modules().values() if (n := len(f.read_text().splitlines())) > 400}
    assert not long, f"files over 400 lines: {long}"


def test_public_names_are_exact_sorted_and_resolve() -> None:
    assert softlabel.__all__ == sorted(softlabel.__all__)
    assert set(softlabel.__all__) == {
        "DistillationLoss",
        "Evaluation",
        "GenerateSummary",
        "LabelJoin",
        "SoftLabelError",
        "SoftLabelLoader",
        "Source",
        "Store",
        "TrainConfig",
        "TrainResult",
        "calibrate",
        "distillation_loss",
        "evaluate",
        "generate",
        "open_source",
        "open_store",
        "train",
        "verify_store",
        "with_soft_labels",
    }
    for name in softlabel.__all__:
        assert getattr(softlabel, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = softlabel.nothing_here


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = "{'dask', 'triton', 'h5py', 'matplotlib', 'torchvision', 'timm', 'transformers', 'onnx', 'onnxruntime'}"
    assert run_python(f"import softlabel, sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_store_needs_no_torch() -> None:
    code = "import softlabel.store.open, softlabel.store.writer, sys; print('torch' in sys.modules)"
    assert run_python(code) == "False"
