"""What every encoding must do, as tests that the tests of an encoding inherit.

    class TestMine(EncodingTests):
        @pytest.fixture
        def encoding(self):
            return Mine(bits=3)

        def decode(self, columns, encoding, case):
            return columns["q"] * columns["step"]  # plain numpy, without a look at the encoding's own code

        def bound(self, columns, encoding, case):
            return columns["step"] / 2

N samples, M members, R = N * M rows, C classes, W elements of a column in one row, D width of a hidden layer.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from softlabel.common.multi_hot import MULTI_HOT
from softlabel.errors import StoreError
from softlabel.labels.encodings import decode as decode_tensors
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.encodings import Encoding
from softlabel.store.open import open_store
from softlabel.store.strict_json import from_json, to_json
from softlabel.store.verify import verify_store
from softlabel.testing.encoding_case import (
    Array,
    EncodingCase,
    draw_case,
    draw_multi_hot,
    read_at,
    read_columns,
    write_case,
    write_documents,
)


class EncodingTests:
    """The contract of an encoding. A subclass gives the fixture `encoding`, and `decode` and `bound` where it can."""

    @pytest.fixture
    def encoding(self) -> Encoding:
        raise NotImplementedError("give the fixture `encoding`: an instance of the encoding, fitted to temperature 4")

    @pytest.fixture(params=[2, 7, 300])
    def case(self, encoding: Encoding, request: pytest.FixtureRequest) -> EncodingCase:
        """Random answers; override it where an encoding needs others."""
        return draw_case(encoding, classes=request.param)

    def decode(self, columns: Mapping[str, Array], encoding: Encoding, case: EncodingCase) -> Array | None:
        """Scaled logits (R, C) of columns (R, W), written again in plain numpy; None: not compared."""
        return None

    def bound(self, columns: Mapping[str, Array], encoding: Encoding, case: EncodingCase) -> Array | float | None:
        """How far a decoded logit may be from the true one, to be broadcast to (R, C); None: it has no bound."""
        return None

    def test_it_is_read_back_from_json(self, encoding: Encoding) -> None:
        assert Encoding.kinds[encoding.name] is type(encoding), "register it in softlabel.store.encodings"
        written = json.loads(json.dumps(to_json(encoding)))
        assert written["name"] == encoding.name
        found = from_json(Encoding, written)  # type: ignore[type-abstract]  # a table of them
        assert found == encoding

    def test_columns_have_the_names_types_and_widths_that_it_declares(
        self, encoding: Encoding, case: EncodingCase
    ) -> None:
        declared = encoding.columns(num_classes=case.num_classes)
        columns = case.encode(encoding)
        assert list(columns) == [one.name for one in declared]
        for one in declared:
            assert columns[one.name].shape == (len(case.scaled_logits), one.width)
            assert columns[one.name].numpy().dtype == np.dtype(one.dtype)

    def test_a_row_does_not_depend_on_its_batch(self, encoding: Encoding, case: EncodingCase) -> None:
        whole = case.encode(encoding)
        again = [case.encode(encoding, rows) for rows in (slice(0, 1), slice(1, 17), slice(17, None))]
        for name, column in whole.items():
            np.testing.assert_array_equal(torch.cat([part[name] for part in again]).numpy(), column.numpy())

    @pytest.mark.parametrize("format", ["parquet", "hdf5"])
    def test_what_was_encoded_is_what_is_read(
        self, tmp_path: Path, encoding: Encoding, case: EncodingCase, format: Literal["parquet", "hdf5"]
    ) -> None:
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        write_case(tmp_path / "store", encoding, case, format=format)
        raw = read_columns(tmp_path / "store")
        with open_store(tmp_path / "store", verify="full") as store:
            rows = store.take(range(len(case.scaled_logits)))
            streamed = np.concatenate([part.scaled_logits for part in store.stream()])
        assert raw.keys() == rows.columns.keys() == columns.keys()
        for name, column in columns.items():
            np.testing.assert_array_equal(raw[name], column)
            np.testing.assert_array_equal(rows.columns[name], column)
            assert raw[name].dtype == rows.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(streamed, rows.scaled_logits)
        self.check_decoded(rows.scaled_logits, columns, encoding, case)
        assert verify_store(tmp_path / "store").ok

    def test_a_store_without_its_shared_arrays_is_not_finished(
        self, tmp_path: Path, encoding: Encoding, case: EncodingCase
    ) -> None:
        if encoding.extra is not None:
            with pytest.raises(StoreError, match=encoding.extra):
                write_case(tmp_path / "store", encoding, replace(case, extra={}))

    def check_decoded(self, found: Array, columns: Mapping[str, Array], encoding: Encoding, case: EncodingCase) -> None:
        """Compare decoded logits (R, C) with the device's decoder, the one in plain numpy, and the teacher's."""
        assert found.dtype == np.float32
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        np.testing.assert_allclose(
            found, decode_tensors(tensors, encoding, read_at(case)).numpy(), rtol=2e-6, atol=1e-5
        )
        expected = self.decode(columns, encoding, case)
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
        bound = self.bound(columns, encoding, case)
        if bound is not None:
            assert (np.abs(found - case.scaled_logits) <= bound).all()

    @pytest.mark.parametrize("format", ["parquet", "hdf5"])
    def test_members_are_kept_apart(
        self, tmp_path: Path, encoding: Encoding, format: Literal["parquet", "hdf5"]
    ) -> None:
        if encoding.from_hidden:
            with pytest.raises(ValueError, match="one teacher"):
                encoding.columns(num_classes=9, members=3)
            return
        case = draw_case(encoding, classes=9, rows=3 * 20)
        write_case(tmp_path / "store", encoding, case, members=3, format=format)
        with open_store(tmp_path / "store", verify="full") as store:
            found = store.take(range(20)).scaled_logits
        assert found.shape == (20, 3, 9)
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        self.check_decoded(found.reshape(60, 9), columns, encoding, case)

    @pytest.mark.parametrize("format", ["parquet", "hdf5"])
    def test_each_position_of_a_document_has_an_answer(
        self, tmp_path: Path, encoding: Encoding, format: Literal["parquet", "hdf5"]
    ) -> None:
        case = draw_case(encoding, classes=9)
        write_documents(tmp_path / "store", encoding, case, [1, 5, 0, 17, 4, 13], format=format)
        raw = read_columns(tmp_path / "store")
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        with open_store(tmp_path / "store", verify="full") as store:
            rows = store.take(range(6))
            last = store.take([5, 2, 1])
        for name, column in columns.items():
            np.testing.assert_array_equal(raw[name], column)
            np.testing.assert_array_equal(rows.columns[name], column)
        assert rows.positions.tolist() == [1, 5, 0, 17, 4, 13]
        self.check_decoded(rows.scaled_logits, columns, encoding, case)
        picked = np.concatenate([rows.scaled_logits[27:], rows.scaled_logits[1:6]])
        np.testing.assert_allclose(last.scaled_logits, picked, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("format", ["parquet", "hdf5"])
    @pytest.mark.parametrize("classes", [1, 9])
    def test_independent_sigmoids_are_stored_or_refused(
        self, tmp_path: Path, encoding: Encoding, classes: int, format: Literal["parquet", "hdf5"]
    ) -> None:
        case = draw_case(encoding, classes=classes, activation="sigmoid")
        if not encoding.sigmoid:
            with pytest.raises(ValueError, match=f"encoding '{encoding.name}'.*found independent sigmoids"):
                write_case(tmp_path / "store", encoding, case, format=format)
            return
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        write_case(tmp_path / "store", encoding, case, format=format)
        raw = read_columns(tmp_path / "store")
        with open_store(tmp_path / "store", verify="full") as store:
            rows = store.take(range(len(case.scaled_logits)))
        for name, column in columns.items():
            np.testing.assert_array_equal(raw[name], column)
        np.testing.assert_array_equal(raw[MULTI_HOT], draw_multi_hot(case))
        np.testing.assert_array_equal(rows.hard_labels, raw[MULTI_HOT])
        self.check_decoded(rows.scaled_logits, columns, encoding, case)
        self.test_the_measured_loss_is_that_of_the_decoded_rows(encoding, case)
        self.test_a_row_does_not_depend_on_its_batch(encoding, case)
        for name, column in columns.items():
            if column.dtype.kind == "f":
                wrong = column.copy()
                wrong[5, 0] = -np.inf
                found = encoding.problem({**columns, name: wrong}, num_classes=classes, activation="sigmoid")
                assert found is not None, f"an infinite number in column {name!r} was not found"
                assert found.startswith("row 5 of a block")

    def test_the_measured_loss_is_that_of_the_decoded_rows(self, encoding: Encoding, case: EncodingCase) -> None:
        columns = case.encode(encoding)
        meter = FidelityMeter(temperature=case.temperature, encoding=encoding, activation=case.activation)
        head = read_at(case).head
        for rows in (slice(0, 15), slice(15, None)):
            part = {name: column[rows] for name, column in columns.items()}
            meter.add(torch.from_numpy(case.scaled_logits)[rows], part, head=head)
        found = meter.result()
        assert found is not None
        arrays = {name: column.numpy() for name, column in columns.items()}
        decoded = encoding.decode(arrays, num_classes=case.num_classes, temperature=case.temperature, extra=case.extra)
        both = (case.scaled_logits, decoded)
        nats = binary_kl(*both) if case.activation == "sigmoid" else kl(*(reversed(both) if encoding.drawn else both))
        assert found.worst_t == pytest.approx(nats.max(), rel=0.02, abs=1e-6)
        assert found.mean_t == pytest.approx(nats.mean(), rel=0.02, abs=1e-6)

    def test_columns_at_another_temperature(self, encoding: Encoding, case: EncodingCase) -> None:
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        warmer = encoding.retemper(columns, 0.5)
        if warmer is None or encoding.from_hidden:
            return
        settings: dict[str, Any] = {"num_classes": case.num_classes, "temperature": case.temperature}
        kept = encoding.decode(columns, extra=case.extra, **settings)
        found = encoding.decode(warmer, extra=case.extra, **settings)
        named = kept != np.sort(kept, axis=1)[:, :1] if encoding.sparse else np.isfinite(kept)
        np.testing.assert_allclose(found[named], kept[named] * 0.5, rtol=1e-5, atol=1e-5)

    def test_values_that_it_never_writes_are_found(self, encoding: Encoding, case: EncodingCase) -> None:
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        assert encoding.problem(columns, num_classes=case.num_classes) is None
        for name, column in columns.items():
            wrong = column.copy()
            if column.dtype.kind == "f":
                wrong[5, 0] = np.nan
            elif name.endswith("index") and np.iinfo(column.dtype).max >= case.num_classes:
                wrong[5, 0] = case.num_classes
            else:
                continue
            found = encoding.problem({**columns, name: wrong}, num_classes=case.num_classes)
            assert found is not None, f"a wrong value in column {name!r} was not found"
            assert found.startswith("row 5 of a block")
            assert name in found

    def test_extreme_and_masked_logits(self, encoding: Encoding) -> None:
        if encoding.from_hidden:
            return  # its logits follow from a layer
        scaled_RC = np.zeros((4, 12), np.float32)
        scaled_RC[1] = -np.arange(12)
        scaled_RC[1, 3:5] = -np.inf
        scaled_RC[2, 1:] = -60_000.0
        scaled_RC[3, 1:] = -np.linspace(1e-4, 3e-3, 11)
        case = EncodingCase(scaled_logits=scaled_RC)
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        assert encoding.problem(columns, num_classes=12) is None
        decoded = encoding.decode(columns, num_classes=12, temperature=case.temperature)
        assert not np.isnan(decoded).any()
        assert not np.isposinf(decoded).any()
        if not encoding.sparse:
            p = np.exp(decoded - np.logaddexp.reduce(decoded, axis=1, keepdims=True))
            assert (p[np.isneginf(scaled_RC)] < 1e-6).all()


def binary_kl(p_logits: Array, q_logits: Array) -> Array:
    """Mean over the classes of KL(p || q) of two outcomes, of each row in nats, in float64."""
    p, q = np.float64(p_logits), np.float64(q_logits)
    log_p, log_not_p, log_q, log_not_q = (-np.logaddexp(0, -x) for x in (p, -p, q, -q))
    found: Array = (np.exp(log_p) * (log_p - log_q) + np.exp(log_not_p) * (log_not_p - log_not_q)).mean(axis=1)
    return found


def kl(p_logits: Array, q_logits: Array) -> Array:
    """KL(p || q) of each row in nats, in float64; a class without probability under p is left out."""
    log_p, log_q = (
        x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (np.float64(p_logits), np.float64(q_logits))
    )
    with np.errstate(invalid="ignore"):
        terms = np.where(np.exp(log_p) > 0, np.exp(log_p) * (log_p - log_q), 0.0)
    found: Array = terms.sum(axis=1)
    return found
