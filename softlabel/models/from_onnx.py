"""``file.onnx``: networks, and forests and other models of scikit-learn, that onnxruntime runs.

Legend: B batch, C classes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlabel.common.file_type import describe_content
from softlabel.common.spec import Spec, literal
from softlabel.errors import SpecError, TeacherError, one_line
from softlabel.models.options import refuse_others
from softlabel.models.program import Program, file_sha256

METADATA = "preprocessing"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
# What a probability of 0 counts as: the smallest normal float32. Every other one is far above it, so softmax gives back
# the probabilities, and at a temperature of 4 a class without votes still has only 3e-10.
_LEAST = torch.finfo(torch.float32).tiny
# Of an independent probability: 1 - p of a float32 is at least half this, and 0 and 1 become logits of -16.6 and 16.6.
_LEAST_ALONE = torch.finfo(torch.float32).eps / 2


class OnnxProgram(Program):
    """An ONNX file: its output `logits`, or `?output=NAME`, or else its first.

    With `?probabilities=true` that output is probabilities: the logits are their logarithm, or, of independent ones,
    log p - log(1 - p).
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        refuse_others(spec, ("output", "probabilities"))
        probabilities = literal(spec.options.get("probabilities", "false"))
        if not isinstance(probabilities, bool):
            raise SpecError(f"{spec.text}: probabilities: expected true or false, found {probabilities!r}")
        self._probabilities = probabilities
        onnx, self._runtime = _packages(spec)
        self.spec, self._path = spec, Path(spec.name)
        if not self._path.is_file():
            raise SpecError(f"{spec.text}: expected an ONNX file, found no such file")
        try:
            model = onnx.load(self._path, load_external_data=False)
        except Exception as error:  # protobuf raises its own kinds
            what = describe_content(self._path) or "one that cannot be parsed"
            raise TeacherError(f"{self._path}: expected an ONNX file, found {what}") from error
        outside = sorted({_beside(self._path, place) for place in _external(model.graph)})
        self.sha256 = file_sha256(self._path, *outside)
        if any(map(_trains, _nodes(model.graph))):
            raise TeacherError(f"{self._path}: was exported in training mode; export it for inference")
        self.place(torch.device("cpu"))
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if not inputs or any(one.type not in _DTYPES or not one.shape for one in inputs):
            listed = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs)
            raise TeacherError(f"{self._path}: expected inputs of numbers with a batch axis, found {listed or 'none'}")
        self._dtypes = {one.name: _DTYPES[one.type] for one in inputs}
        self.shapes = {
            one.name: tuple(size if isinstance(size, int) and size > 0 else None for size in one.shape[1:])
            for one in inputs
        }
        self._output = self._choose_output(outputs)
        self.outputs = tuple(output.name for output in outputs)
        first = inputs[0].shape[0]
        self.batch = (first, first) if isinstance(first, int) and first > 0 else (1, None)
        self.described = self._metadata()

    @property
    def takes_float64(self) -> bool:
        return np.float64 in self._dtypes.values()

    def place(self, device: torch.device) -> None:
        wanted: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in self._runtime.get_available_providers():
                raise SpecError(
                    f"{self.spec.text}: the onnxruntime installed here has no CUDA; install onnxruntime-gpu, or use "
                    "--device cpu"
                )
            wanted.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = self._runtime.InferenceSession(str(self._path), options, providers=wanted)
        except Exception as error:  # onnxruntime raises its own kinds
            raise TeacherError(f"{self._path}: onnxruntime cannot load it: {one_line(error, limit=200)}") from error
        if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise TeacherError(f"{self._path}: onnxruntime cannot use {device} (see its log); use --device cpu")

    def run(self, tensors: Mapping[str, Tensor], further: Sequence[str] = ()) -> Sequence[Tensor]:
        device = next(iter(tensors.values())).device
        arrays = {name: _convert(tensors[name], name, dtype) for name, dtype in self._dtypes.items()}
        found, *others = self._session.run([self._output, *further], arrays)
        if isinstance(found, list):  # of a ZipMap: a dict of probabilities for each sample
            found = _rows_of_maps(found, self._output)
        output = torch.from_numpy(found).to(device)
        beside = [torch.from_numpy(other).to(device) for other in others]
        return [self._invert(output) if self._probabilities else output, *beside]

    def _choose_output(self, outputs: Any) -> str:
        names = [output.name for output in outputs]
        asked = self.spec.options.get("output")
        if asked is not None and asked not in names:
            raise SpecError(f"{self.spec.text}: output: expected one of {', '.join(names)}, found {asked!r}")
        chosen: str = asked or ("logits" if "logits" in names else names[0])
        kind = next(output.type for output in outputs if output.name == chosen)
        # A classifier of scikit-learn gives its decisions first.
        if kind not in ("tensor(float)", "tensor(float16)", "tensor(double)", "seq(map(int64,tensor(float)))"):
            listed = ", ".join(f"{output.name}: {output.type}" for output in outputs)
            raise SpecError(
                f"{self.spec.text}: output {chosen}: expected floats, found {kind}; choose another of {listed} with "
                "output=NAME, and add probabilities=true where it is probabilities"
            )
        return chosen

    def _invert(self, probabilities_BC: Tensor) -> Tensor:
        """Logits whose softmax, or sigmoid, the probabilities are."""
        independent = self.activation == "sigmoid"
        total_B = probabilities_BC.sum(dim=-1)
        # Forests give 1 - p for the other class, which rounds to a little below 0.
        inside = bool(((probabilities_BC > -1e-5) & (probabilities_BC < 1 + 1e-5)).all())
        if not inside or not (independent or bool(((total_B - 1).abs() < 1e-3).all())):
            raise TeacherError(
                f"output {self._output}: expected probabilities {'from 0 to 1' if independent else 'that sum to 1'}, "
                f"found a row from {float(probabilities_BC.min()):.4g} to {float(probabilities_BC.max()):.4g}; leave "
                "probabilities= out where they are logits"
                + ("" if independent or not inside else ", or give --activation sigmoid where each stands alone")
            )
        if independent:  # float64: 1 - p of a float32 has few digits
            return probabilities_BC.double().clamp(_LEAST_ALONE, 1 - _LEAST_ALONE).logit().float()
        return probabilities_BC.float().clamp(min=_LEAST).log()

    def _metadata(self) -> Any:
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise SpecError(f"{self._path}: expected JSON in its metadata {METADATA!r}, found {text!r}") from error


def _convert(tensor: Tensor, name: str, dtype: Any) -> np.ndarray[Any, Any]:
    """In the type of the input; whole numbers alone become integers."""
    given = tensor.cpu().numpy()
    array = np.ascontiguousarray(given, dtype=dtype)
    if array.dtype.kind in "iub" and not np.array_equal(array, given):
        raise TeacherError(f"input {name}: expected whole numbers, as it is of {array.dtype}, found others")
    return array


def _rows_of_maps(rows: list[dict[int, float]], name: str) -> np.ndarray[Any, Any]:
    """Probabilities by class number as an array float32 (B, C)."""
    classes = sorted(rows[0]) if rows else []
    if classes != list(range(len(classes))):
        raise TeacherError(
            f"output {name}: expected classes numbered from 0, found {', '.join(map(str, classes[:5]))}; train it on "
            "such labels"
        )
    return np.array([[row[number] for number in classes] for row in rows], dtype=np.float32)


def _nodes(graph: Any) -> Iterator[Any]:
    """Every node of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _external(graph: Any) -> Iterator[str]:
    """Names of the files in which the weights of a graph lie, beside the ONNX file."""
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                yield from _external(inner)
    for tensor in tensors:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _beside(path: Path, location: str) -> Path:
    place = PurePosixPath(location)
    if place.is_absolute() or ".." in place.parts:
        raise TeacherError(f"{path}: refused, because it asks for a file outside its folder: {location!r}")
    found = path.parent / place
    if not found.is_file():
        raise SpecError(f"{path}: expected its weights in {found}, found no such file")
    return found


def _trains(node: Any) -> bool:
    return any(a.name == "training_mode" and a.i for a in node.attribute)


def _packages(spec: Spec) -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise SpecError(f"{spec.text}: needs onnx and onnxruntime ({error}); pip install 'softlabel[onnx]'") from error
    return onnx, onnxruntime
