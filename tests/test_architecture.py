"""The packages and who may import whom, no circle between files, and what stays out of `import softlabel`."""

import ast
import subprocess
import sys
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

import softlabel
from softlabel.models import build_model

PACKAGE = Path(softlabel.__file__).parent

# package -> the packages of softlabel that it may import, and the ones from outside.
GROUND = "errors common inputs"
LABELS = f"{GROUND} store models dataset views labels"
MAY_IMPORT = {
    "errors": ("", ""),
    "common": ("errors", "numpy pyarrow torch"),
    "inputs": ("errors", "torch torchvision numpy PIL simplejpeg xxhash tokenizers jinja2"),
    "loss": ("errors", "torch triton"),
    "store": ("errors common", "numpy pyarrow h5py fsspec safetensors xxhash"),
    "models": (GROUND, "torch torchvision numpy safetensors timm transformers onnx onnxruntime vllm"),
    "dataset": (GROUND, "torch torchvision pyarrow h5py fsspec numpy xxhash PIL sklearn tqdm"),
    "views": (f"{GROUND} store", "torch torchvision numpy xxhash PIL simplejpeg yaml"),
    "labels": ("errors common store", "torch numpy"),
    "loader": (f"{LABELS} loss", "torch numpy"),
    "generation": (LABELS, "torch numpy tqdm"),
    "evaluation": (f"{LABELS} loss loader", "torch numpy tqdm matplotlib sklearn"),
    "convert": (f"{GROUND} store labels", "torch numpy pyarrow safetensors tqdm xxhash"),
    "cluster": (f"{LABELS} generation", "dask distributed tqdm"),
    # A store that was made from other stores is repaired from those.
    "maintain": (f"{LABELS} loss loader generation evaluation convert", "torch numpy tqdm"),
    "training": (
        f"{LABELS} loss loader evaluation generation convert",
        "torch numpy safetensors tqdm yaml tensorboard wandb mlflow optuna",
    ),
    "report": (f"{LABELS} loss loader evaluation training", "torch numpy tqdm jinja2 markupsafe PIL"),
    "testing": (f"{GROUND} store dataset labels", "pytest torch numpy pyarrow h5py xxhash safetensors"),
    "cli": ("*", "jsonargparse docstring_parser yaml tqdm"),
    "__main__": ("cli", ""),
    "__init__": ("*", ""),
}
# Imports that wait for the call, and why: none of them may hide a circle, which the test of circles sees to.
MAY_WAIT = {
    "cli": "--help and a mistyped option are answered without torch",
    "loss/dispatch.py": "triton is imported where a GPU is used",
}


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


@lru_cache
def imports(file: Path) -> frozenset[tuple[str, bool]]:
    """What a file imports, and whether inside a function: modules, by their dotted names; `if TYPE_CHECKING` counts."""
    tree = ast.parse(file.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in inside) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add((inner if inner in modules() else node.module, id(node) in inside))
    return frozenset(found)


@pytest.mark.parametrize("name", modules())
def test_imports_follow_the_table(name: str) -> None:
    file = modules()[name]
    package = package_of(file)
    assert package in MAY_IMPORT, f"{file}: a new package; add it to the table here and in the guide"
    ours, others = (text.split() for text in MAY_IMPORT[package])
    for imported, waits in imports(file):
        first, _, rest = imported.partition(".")
        inner = rest.split(".")[0]
        if first == "softlabel":
            assert inner in {"", package, *ours} or "*" in ours, f"{name} imports {imported}"
            assert inner != "testing" or package == "testing", f"{name} imports {imported}, which needs pytest"
            reason = MAY_WAIT.get(package) or MAY_WAIT.get(str(file.relative_to(PACKAGE)))
            assert not waits or reason, f"{name} imports {imported} inside a function"
        elif first not in sys.stdlib_module_names:
            assert first in others, f"{name} imports {imported}"


def test_there_is_no_circle_between_files() -> None:
    # A package's face imports its modules; a module that imports the face of its own package would be a circle.
    arrows = {name: {to for to, _ in imports(file) if to in modules()} for name, file in modules().items()}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_tree_is_small() -> None:
    tops = {entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"}
    assert {name for name in tops if "." in name} == {"__init__.py", "__main__.py", "errors.py", "py.typed"}
    assert len({name for name in tops if "." not in name}) <= 19


def test_the_longest_chain_of_packages_is_short() -> None:
    above = {
        name: set(MAY_IMPORT) - {name} if ours == "*" else set(ours.split()) for name, (ours, _) in MAY_IMPORT.items()
    }
    above["cli"] -= {"__init__", "__main__"}
    del above["__init__"]
    del above["__main__"]
    heights: dict[str, int] = {}
    for name in TopologicalSorter(above).static_order():
        heights[name] = 1 + max((heights[below] for below in above[name]), default=0)
    assert max(heights.values()) <= 9, heights


def test_no_encoding_is_told_by_its_name() -> None:
    # What depends on the encoding is a method or an attribute of it, or stands in a table by its class.
    names = {"float32", "float16", "int8", "topk", "sampled", "head"}
    found = []
    for name, file in modules().items():
        if ".encodings" in name or name.startswith("softlabel.testing"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
            elif isinstance(node, ast.Match):
                sides = [node.subject, *(value for case in node.cases for value in ast.walk(case.pattern))]
            else:
                continue
            named = any(isinstance(one, ast.Attribute) and one.attr == "name" for one in sides)
            texts = {one.value for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant)}
            if named and (names & texts or any("encoding" in ast.unparse(side) for side in sides)):
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


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
        "WrittenReport",
        "calibrate",
        "crossfit",
        "distillation_loss",
        "evaluate",
        "generate",
        "open_source",
        "open_store",
        "train",
        "verify_store",
        "with_soft_labels",
        "write_report",
    }
    for name in softlabel.__all__:
        assert getattr(softlabel, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = softlabel.nothing_here


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = {
        "dask",
        "triton",
        "h5py",
        "matplotlib",
        "torchvision",
        "timm",
        "transformers",
        "tokenizers",
        "onnx",
        "onnxruntime",
        "pytest",
    }
    assert run_python(f"import softlabel, sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_labels_of_small_images_need_no_torchvision(tmp_path: Path) -> None:
    """It takes longer to import than torch does, and so does torch's compiler."""
    weights = tmp_path / "resnet20.safetensors"
    save_file(build_model("zoo:resnet20?num_classes=10").state_dict(), weights)
    (tmp_path / "images").mkdir()
    for shade in range(0, 256, 32):
        Image.new("RGB", (32, 32), (shade, 0, 255 - shade)).save(tmp_path / f"images/{shade}.png")
    options = f"teachers=['zoo:resnet20@{weights}'], out='{tmp_path}/labels', temperature=1.0, progress=False"
    heavy = {"torchvision", "torch._dynamo", "sympy"}
    code = f"import softlabel, sys; softlabel.generate('{tmp_path}/images', {options}); "
    code += f"print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_store_needs_no_torch() -> None:
    code = "import softlabel.store.open, softlabel.store.writer, sys; print('torch' in sys.modules)"
    assert run_python(code) == "False"
