"""One matrix of cases for every implementation: values and gradients against the naive float64 reference."""

import shutil

import pytest

from tests.support.loss_cases import Case, compare_with_reference, make_full_cases, make_quick_cases

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler (g++ or clang++) for torch.compile"
)


@pytest.mark.parametrize("case", list(make_quick_cases()), ids=str)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_quick(impl: str, case: Case) -> None:
    compare_with_reference(case, impl, upstream=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(make_full_cases()), ids=str)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_full(impl: str, case: Case) -> None:
    compare_with_reference(case, impl, upstream=0.25)


@needs_compiler
@pytest.mark.parametrize("case", [Case(), Case(kind="topk", weight=True), Case(classes=401, temperature=1.0)], ids=str)
def test_compiled(case: Case) -> None:
    compare_with_reference(case, "compile", upstream=3.0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", list(make_quick_cases()), ids=str)
def test_compiled_all(case: Case) -> None:
    import torch

    torch.compiler.reset()
    compare_with_reference(case, "compile")
