"""``file.pt2``: programs that `torch.export.save` wrote.

Reading one can execute what is in it: torch unpickles parts of the archive, evaluates its symbolic expressions and
compiles its graph to Python. So the SPEC has to say that the file is trusted.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softlabel.common.file_type import describe_content
from softlabel.common.spec import Spec, literal
from softlabel.errors import SpecError, TeacherError, one_line
from softlabel.models.options import refuse_others
from softlabel.models.program import Program, file_sha256

METADATA = "preprocessing.json"


class ExportedProgram(Program):
    """A program of `torch.export`; its inputs have the names of its arguments."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        refuse_others(spec, ("trust",))
        path = Path(spec.name)
        if not path.is_file():
            raise SpecError(f"{spec.text}: expected a program of torch.export, found no such file")
        if literal(spec.options.get("trust", "false")) is not True:
            raise SpecError(
                f"{spec.text}: refused, because reading a .pt2 file can execute code in it; if you trust its author, "
                "add trust=true to its options, or else ask for the weights as safetensors"
            )
        extra: dict[str, Any] = {METADATA: ""}
        try:
            self._program = torch.export.load(path, extra_files=extra)
        except Exception as error:  # whatever a damaged file provokes
            reason = describe_content(path) or one_line(error, limit=200)
            raise TeacherError(f"{path}: cannot be loaded as a program of torch.export: {reason}") from error
        self.spec, self.sha256 = spec, file_sha256(path)
        self.described = _json(path, extra[METADATA])
        if any(map(_trains, self._program.graph.nodes)):
            raise TeacherError(
                f"{path}: was exported in training mode, its answer to an image would depend on the rest of the batch; "
                "export model.eval()"
            )
        names = self._program.graph_signature.user_inputs
        given = [node for node in self._program.graph.nodes if node.op == "placeholder" and node.name in names]
        inputs = [node.meta["val"] for node in given]
        if not inputs or not all(isinstance(one, Tensor) and one.dim() for one in inputs):
            raise TeacherError(f"{path}: expected a program of tensors with a batch axis, found {inputs}")
        self._dtypes = {node.name: one.dtype for node, one in zip(given, inputs, strict=True)}
        self.shapes = {
            node.name: tuple(size if isinstance(size, int) else None for size in one.shape[1:])
            for node, one in zip(given, inputs, strict=True)
        }
        self.batch = self._limits(inputs[0].shape[0])
        self.place(torch.device("cpu"))

    def _limits(self, batch: Any) -> tuple[int, int | None]:
        if isinstance(batch, int):
            return batch, batch
        found = self._program.range_constraints.get(batch.node.expr)
        # torch takes 0 and 1 to be special while it exports, and says 2 where a smaller batch works as well.
        lower = 1 if found is None else max(int(found.lower), 1)
        upper = None if found is None or not found.upper.is_number or found.upper > 2**31 else int(found.upper)
        return lower, upper

    @property
    def takes_float64(self) -> bool:
        return torch.float64 in self._dtypes.values()

    def place(self, device: torch.device) -> None:
        from torch.export.passes import move_to_device_pass

        # Its devices are written into the graph. A tuple hides it from nn.Module, whose eval() it refuses.
        self._module = (move_to_device_pass(self._program, device).module(),)

    def run(self, tensors: Mapping[str, Tensor], further: Sequence[str] = ()) -> Sequence[Any]:
        tree = self._program.call_spec.in_spec
        assert tree is not None
        leaves = [tensors[name].to(dtype) for name, dtype in self._dtypes.items()]
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, tree)
        return [self._module[0](*args, **kwargs)]


def _json(path: Path, text: Any) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise SpecError(f"{path}: expected JSON in its {METADATA}, found {text!r}") from error


def _trains(node: torch.fx.Node) -> bool:
    """Whether a node of the graph is a batch norm or a dropout in training mode."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.overload_name == "no_stats":  # an instance norm, which has nothing else
        return False
    for place, argument in enumerate(schema.arguments):
        if argument.name in ("training", "train", "dropout_p"):
            named = node.kwargs.get(argument.name, argument.default_value)
            if node.args[place] if place < len(node.args) else named:
                return True
    return False
