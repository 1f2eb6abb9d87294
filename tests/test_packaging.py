"""What pyproject.toml promises: that every package which is imported is declared, and what an index will show."""

import ast
import importlib.metadata
import re
import sys
import tomllib

import pytest

import softlabel
from tests.support.shared_data import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
# Packages whose module has another name.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml", "dask-jobqueue": "dask_jobqueue"}
MODULES |= {"docstring-parser": "docstring_parser"}
# Imported where they are installed, by tests and commands that do without.
ABSENT = {"triton", "mlflow", "wandb"}


def modules(*extras: str) -> set[str]:
    """The modules of what the package requires, and of these extras."""
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    names = [re.split(r"[\[<>=;]", line)[0].strip() for line in wanted]
    return {MODULES.get(name, name) for name in names}


@pytest.mark.parametrize("folder", ["softlabel", "tests", "pipelines", "data"])
def test_what_is_imported_is_declared(folder: str) -> None:
    known = modules(*(PROJECT["optional-dependencies"] if folder == "softlabel" else ("digits", "dev")))
    found: dict[str, str] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "importorskip":
                names = [ast.literal_eval(node.args[0])]
            found |= {name.partition(".")[0]: f"{path}:{node.lineno}" for name in names}  # type: ignore[attr-defined]
    beside = {path.stem for path in (ROOT / folder).glob("*.py")}
    others = set(found) - set(sys.stdlib_module_names) - {"softlabel", "tests", "pipelines"} - known - beside - ABSENT
    assert not others, {name: found[name] for name in others}


def test_the_metadata_of_the_package() -> None:
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
    assert PROJECT["authors"] == [{"name": "softlabel developers"}]
    assert importlib.metadata.version("softlabel") == softlabel.__version__
    versions = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name}
    assert versions >= {"3.11", "3.12", "3.13"}
    assert PROJECT["requires-python"] == ">=3.11"


def test_files_that_are_not_python_are_packaged() -> None:
    folder = ROOT / "softlabel"
    patterns = SETUPTOOLS["package-data"]["softlabel"]
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    assert all(any(folder.glob(pattern)) for pattern in patterns)
    there = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there == shipped


def test_the_demo_needs_only_its_extra() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: \$\(RUNS\)$", makefile, flags=re.MULTILINE)
    assert "--editable '.[digits]'\n\t@touch $(RUNS)" in makefile
