"""The rooms and the arrows between them: who may import whom, and what stays out of `import softlabel`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softlabel

PACKAGE = Path(softlabel.__file__).parent

# room -> what it may import beside the standard library, `errors` and `arguments`.
THIRD = {
    "numpy",
    "torch",
    "torchvision",
    "pyarrow",
    "h5py",
    "fsspec",
    "xxhash",
    "safetensors",
    "PIL",
    "sklearn",
    "yaml",
}
THIRD |= {"jsonargparse", "docstring_parser", "tqdm", "matplotlib", "triton", "dask", "distributed", "tensorboard"}
THIRD |= {"wandb", "mlflow"}
THIRD |= {"timm", "transformers", "onnx", "onnxruntime"}
MAY_IMPORT = {
    "errors": set(),
    "arguments": set(),
    "allocator": set(),
    "device": {"torch"},
    "pace": set(),
    "spec": set(),
    "dataset": {
        "files",
        "spec",
        "torch",
        "torchvision",
        "pyarrow",
        "h5py",
        "fsspec",
        "numpy",
        "xxhash",
        "PIL",
        "sklearn",
    }
    | {"store.keys", "store.index"},
    "views": {"torch", "torchvision", "numpy", "xxhash", "PIL", "yaml", "order", "spec", "store"},
    "zoo": {"torch"},
    "files": set(),
    "preprocessing": {"torch", "torchvision"},
    "models": {"torch", "torchvision", "numpy", "safetensors", "files", "preprocessing", "spec", "zoo"}
    | {"timm", "transformers", "onnx", "onnxruntime"},
    "teacher": {"device", "torch", "models", "preprocessing", "spec"},
    "labels": {"torch"},
    "encoding": {"torch", "numpy", "store.columns", "store.manifest"},
    "store": {"numpy", "pyarrow", "h5py", "fsspec", "safetensors", "xxhash"},
    "head": {"torch", "safetensors", "teacher"},
    "intake": {"torch", "numpy", "dataset", "store", "teacher", "views"},
    "transfer": {"torch", "numpy"},
    "members": {"torch", "device", "models", "preprocessing", "teacher", "transfer"},
    "engine": {"torch", "numpy", "dataset", "device", "intake", "members", "teacher", "head", "labels", "encoding"}
    | {"pace", "store", "transfer", "views"},
    "sizing": {"torch", "device", "engine", "members"},
    "lanes": {"torch", "device", "engine", "intake", "pace", "store", "transfer"},
    "history": {"numpy", "dataset", "intake", "store", "views"},
    "calibration": {"torch", "store"},
    "calibrate": {"torch", "numpy", "tqdm", "calibration", "dataset", "evaluate", "job", "store"},
    "job": {
        "torch",
        "numpy",
        "calibration",
        "members",
        "sizing",
        "device",
        "dataset",
        "teacher",
        "labels",
        "engine",
        "store",
        "head",
        "history",
        "views",
    },
    "upkeep": {
        "torch",
        "numpy",
        "algebra",
        "device",
        "tqdm",
        "dataset",
        "engine",
        "generate",
        "history",
        "job",
        "store",
    },
    "audit": {"numpy", "dataset", "job", "store"},
    "extend": {
        "torch",
        "numpy",
        "dataset",
        "engine",
        "generate",
        "history",
        "job",
        "labels",
        "store",
        "upkeep",
        "views",
    },
    "generate": {"torch", "device", "tqdm", "dataset", "labels", "engine", "store", "history", "intake", "job"}
    | {"deployment", "cluster", "lanes", "pace", "preflight", "views"},
    "algebra": {"torch", "numpy", "pyarrow", "safetensors", "tqdm", "xxhash", "encoding", "labels", "store"},
    "order": {"numpy"},
    "loader": {"torch", "numpy", "labels", "store", "encoding", "views", "dataset", "order", "teacher", "loss"},
    "loss": {"torch", "triton"},
    "train": {
        "torch",
        "safetensors",
        "tqdm",
        "yaml",
        "numpy",
        "loader",
        "loss",
        "models",
        "teacher",
        "views",
        "dataset",
    }
    | {"files", "evaluate", "store", "tensorboard", "device", "labels", "order", "spec", "wandb", "mlflow"},
    "evaluate": {"device", "spec", "torch", "tqdm", "numpy", "loader", "loss", "models", "teacher", "dataset", "store"},
    "report": {"matplotlib", "numpy"},
    "cli": THIRD | {"*"},
    "commands": {"*"},
    "shardjob": {"allocator", "device", "engine", "job", "lanes", "store", "upkeep"},
    "deployment": {"spec"},
    "cluster": {"dask", "distributed", "tqdm", "deployment", "generate", "job", "shardjob", "spec", "store"},
    "trial": {"numpy", "torch", "dataset", "intake", "job", "lanes", "store"},
    "diagnosis": {"numpy", "torch", "dataset", "engine", "intake", "teacher", "trial"},
    "plan": {"torch", "encoding", "engine", "head", "job", "store", "trial"},
    "preflight": {"diagnosis", "job", "plan", "repeatability", "store", "trial"},
    "repeatability": {"numpy", "torch", "engine", "intake", "lanes", "members", "teacher", "trial"},
    "__main__": {"cli"},
    "__init__": {"*"},
}


def rooms() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file) for file in files]


def imports(file: Path) -> set[str]:
    """Absolute names of the modules a file imports, also inside functions; relative imports are refused."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            found.add(node.module)
            if node.module in {"softlabel", "softlabel.store"}:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("room", "file"), rooms(), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_imports_follow_the_table(room: str, file: Path) -> None:
    assert room in MAY_IMPORT, f"{file}: a new room; add it to the table here and in the README"
    allowed = MAY_IMPORT[room]
    for name in imports(file):
        parts = name.split(".")
        if parts[0] in sys.stdlib_module_names:
            continue
        if parts[0] == "softlabel":
            inner = parts[1:]
            ok = (
                not inner
                or inner[0] in {"arguments", "errors", room}
                or "*" in allowed
                or inner[0] in allowed
                or ".".join(inner[:2]) in allowed
            )
            assert ok, f"{room} imports {name}"
        else:
            assert parts[0] in allowed or "*" in allowed, f"{room} imports {name}"


def test_only_the_named_heavy_packages_exist_in_the_package() -> None:
    third = {name.split(".")[0] for _, file in rooms() for name in imports(file)}
    unknown = third - set(sys.stdlib_module_names) - THIRD - {"softlabel"}
    assert not unknown, f"packages outside the architecture: {unknown}"


def test_files_stay_readable() -> None:
    long = {str(f.relative_to(PACKAGE)): n for _, f in rooms() if (n := len(f.read_text().splitlines())) > 400}
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
    code = "import softlabel.store.reader, softlabel.store.writer, sys; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_functions_stay_functions_when_their_file_is_imported_first() -> None:
    code = "from softlabel.generate import GenerateSummary; import softlabel; print(callable(softlabel.generate))"
    assert run_python(code) == "True"
