"""``file.onnx``: networks that onnxruntime runs.

Legend: B batch, H height, W width.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlabel.common.file_type import describe_content
from softlabel.common.spec import Spec
from softlabel.errors import SpecError, TeacherError, one_line
from softlabel.models.options import refuse_others
from softlabel.models.program import Program, file_sha256

METADATA = "preprocessing"
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class OnnxProgram(Program):
    """An ONNX network of one image tensor: its output `logits`, or else its first."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        refuse_others(spec)
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
        shape = list(inputs[0].shape) if len(inputs) == 1 else []
        self._channels_last = len(shape) == 4 and shape[1] != 3 and shape[3] == 3
        if len(shape) != 4 or inputs[0].type not in _DTYPES or (shape[1] != 3 and not self._channels_last):
            listed = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs)
            raise TeacherError(
                f"{self._path}: expected one input of floats, (batch, 3, height, width) or (batch, height, width, 3), "
                f"found {listed}"
            )
        self._input, self._dtype = inputs[0].name, _DTYPES[inputs[0].type]
        names = [output.name for output in outputs]
        self._output = "logits" if "logits" in names else names[0]
        height, width = shape[1:3] if self._channels_last else shape[2:]
        self.side = height if isinstance(height, int) and height == width else None
        self.batch = (shape[0], shape[0]) if isinstance(shape[0], int) and shape[0] > 0 else (1, None)
        self.described = self._metadata()

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

    def run(self, images_BCHW: Tensor) -> Tensor:
        if self._channels_last:
            images_BCHW = images_BCHW.permute(0, 2, 3, 1)
        array = np.ascontiguousarray(images_BCHW.cpu().numpy(), dtype=self._dtype)
        (found,) = self._session.run([self._output], {self._input: array})
        return torch.from_numpy(found).to(images_BCHW.device)

    def _metadata(self) -> Any:
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise SpecError(f"{self._path}: expected JSON in its metadata {METADATA!r}, found {text!r}") from error


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
