"""Arguments of another type than their annotation are refused, through every public function that takes flags."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabel
from softlabel.common.arguments import check_values
from softlabel.common.spec import Spec, literal, parse_spec, quote_path, split_options
from softlabel.errors import UsageError


def train(**wrong: Any) -> None:
    softlabel.TrainConfig(data="d", student="zoo:cnn2", out="o", **wrong)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda **wrong: softlabel.generate("d", teachers=["zoo:resnet8@w"], out="o", **wrong), {"grow": "false"}),
        (lambda **wrong: softlabel.generate("d", teachers=["zoo:resnet8@w"], out="o", **wrong), {"combine": "mean"}),
        (lambda **wrong: softlabel.generate("d", out="o", **wrong), {"teachers": "zoo:resnet8@w"}),
        (lambda **wrong: softlabel.SoftLabelLoader("d", **wrong), {"ignore_labels": "false"}),
        (lambda **wrong: softlabel.calibrate("d", teachers=["zoo:resnet8@w"], **wrong), {"samples": 2.5}),
        (lambda **wrong: softlabel.evaluate("run:r", "d", **wrong), {"precision": "fp8"}),
        (train, {"overwrite": "false"}),
        (train, {"epochs": True}),
        (train, {"lr": [0.1, "0.2"]}),
        (train, {"tracker": 3}),
        (train, {"seed": None}),
    ],
)
def test_a_wrong_type_is_refused_by_name(
    call: Callable[..., Any], wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{next(iter(wrong))}: expected .*, found "):
        call(**wrong)
    assert not any(tmp_path.iterdir())


def test_equal_types_are_taken() -> None:
    given = {"a": np.int64(3), "b": 3, "c": np.float32(0.5), "d": ("x",), "e": None}
    hints = {"a": int, "b": float, "c": float | list[float], "d": list[str], "e": str | None}
    check_values(given, hints)


@pytest.mark.parametrize(("word", "value"), [("no", False), ("Off", False), ("YES", True), ("0", 0), ("null", None)])
def test_words_in_a_spec(word: str, value: object) -> None:
    assert literal(word) == value


@pytest.mark.parametrize("path", ["a?b", "a%3Fb", "a%253fb?", "100%", "a%20b", "?%3F%25"])
def test_a_path_in_a_spec_comes_back(path: str) -> None:
    spec = Spec(kind="zoo", name="resnet8", checkpoint=path, options={"mean": "0.5", "text": "a&b?c%"})
    assert parse_spec(spec.text) == spec
    assert split_options(f"{quote_path(path)}?label=x", subject="") == (path, {"label": "x"})
