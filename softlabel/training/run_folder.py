"""The files of a run folder: written whole or not at all, and read without executing anything in them.

run.json            what the run is (its identity)
config.yaml         the settings as given, for `--config`
checkpoint.pt       where it is
metrics.csv, tensorboard/
best.safetensors    the weights of the best evaluation so far
failed.json         why the student was given up
tracker.json        its id at --tracker, so that a resumed run goes on there
projector.safetensors       what was trained beside a student for a loss on its embedding; the student is without it
best-projector.safetensors
model.safetensors, model.json      the student, once it is finished; model.json is the last to appear
epoch-N/            the student as it was after epoch N, where `keep_epochs` names it: a run folder for SPECs
tokenizer.json      of a student that takes texts; a language model has config.json beside it, for transformers

The folder of several students holds one such folder each, and students.json, results.csv, curves.png beside them, and
stacks.json: with `stack="auto"`, which of them are stacked, and what a trial of it measured.
With `step="auto"`, steps.json says which make their steps as a CUDA graph, and what a trial of it measured.
"""

import contextlib
import copy
import fcntl
import io
import json
import pickle
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from softlabel.common.atomic_file import write_atomically as write_whole
from softlabel.common.spec import quote_path
from softlabel.errors import MismatchError, SoftLabelError, TrainingError, UsageError, one_line
from softlabel.inputs.tokenizer import TOKENIZER

CHECKPOINT, IDENTITY, CONFIG, METRICS, BOARD = "checkpoint.pt", "run.json", "config.yaml", "metrics.csv", "tensorboard"
MODEL = ("model.json", "model.safetensors")
FORMAT = 3  # of a checkpoint
DATA_KEYS = "data (fingerprint of the keys)"  # name in a run's identity of what its data is
BEST, FAILED, STUDENTS = "best.safetensors", "failed.json", "students.json"
TRACKER = "tracker.json"
PROJECTOR, BEST_PROJECTOR = "projector.safetensors", "best-projector.safetensors"
STACKS, STEPS = "stacks.json", "steps.json"
OF_TRANSFORMERS = ("config.json", "tokenizer_config.json", "chat_template.jinja")


def write_atomically(path: Path, content: bytes) -> None:
    """Raises TrainingError: the disk is full or the folder cannot be written to."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error}; the same command resumes once it can") from error


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Raises TrainingError: the disk is full."""
    buffer = io.BytesIO()
    torch.save(own_memory({"format": FORMAT, **state}), buffer)
    write_atomically(folder / CHECKPOINT, buffer.getvalue())


def own_memory(value: Any) -> Any:
    """The same with tensors that are views of larger ones copied: torch.save writes all of what a view is of."""
    if isinstance(value, torch.Tensor):
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    if isinstance(value, dict):
        made = copy.copy(value)
        made.update((name, own_memory(one)) for name, one in value.items())
        return made
    return value


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, None if there is none yet.

    Raises:
        TrainingError: the file is damaged, or not a checkpoint.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"{path}: damaged ({reason}); remove it, or start again with --overwrite") from error
    assert isinstance(state, dict)
    if state.get("format") != FORMAT:
        raise TrainingError(
            f"{path}: expected format {FORMAT}, found {state.get('format')}: another version of softlabel wrote it; "
            "finish the run with that one, or start again with --overwrite"
        )
    return state


def save_weights(path: Path, model: nn.Module) -> None:
    """Raises TrainingError: the disk is full."""
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_atomically(path, save(state))


def save_parameters(path: Path, module: nn.Module) -> None:
    """The same without buffers."""
    write_atomically(path, save({name: one.detach().cpu().contiguous() for name, one in module.named_parameters()}))


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill a model with what `save_weights` wrote.

    Raises:
        TrainingError: the file is gone or damaged.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); start again with --overwrite") from error


def read_failure(folder: Path) -> str | None:
    """Why the student of a folder was given up, if it was."""
    try:
        return str(json.loads((folder / FAILED).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return None


def write_failure(folder: Path, reason: str) -> None:
    write_atomically(folder / FAILED, json.dumps({"reason": reason}, indent=2).encode() + b"\n")


@contextlib.contextmanager
def run_folder(
    folder: Path, *, identity: Mapping[str, Any], config: Mapping[str, Any], overwrite: bool
) -> Iterator[None]:
    """Hold a run folder for one run: new, or this run's own. A new run that is refused leaves nothing in its way.

    Raises:
        MismatchError: another run's; says what differs.
        UsageError: something else lies there, or another process is at it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        if is_finished(folder) and not overwrite:  # on a disk that is read-only, say: there is nothing to write
            _check_identity(folder, identity)
            yield
            return
        raise UsageError(f"{folder}: cannot be used as a run folder: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{folder}: another process is training there; wait, or use another --out") from error
        if overwrite:
            _clear(folder)
        _check_identity(folder, identity)
        write_atomically(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())
        try:
            yield
        except SoftLabelError:
            if not _has_begun(folder):
                (folder / IDENTITY).unlink(missing_ok=True)
                (folder / CONFIG).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def hold_students(folder: Path, students: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> Iterator[None]:
    """Make the folder of several students, and say in it which they are. New ones that are refused leave nothing.

    Raises:
        UsageError: something else lies there.
    """
    if any((folder / name).exists() for name in (IDENTITY, CHECKPOINT, *MODEL)):
        raise UsageError(f"{folder}: holds the run of a single student; use another --out")
    if (folder / "manifest.json").exists():
        raise UsageError(f"{folder}: holds a store of soft labels; use another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = json.loads((folder / STUDENTS).read_text(encoding="utf-8")) if (folder / STUDENTS).exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: cannot be used as a run folder: {error}") from error
    write_atomically(folder / STUDENTS, json.dumps({**earlier, **students}, indent=2).encode() + b"\n")
    write_atomically(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())
    try:
        yield
    except SoftLabelError:
        if not earlier and not any(_has_begun(folder / name) for name in students):
            (folder / STUDENTS).unlink(missing_ok=True)
            (folder / CONFIG).unlink(missing_ok=True)
        raise


def _has_begun(folder: Path) -> bool:
    """Whether a run has got so far that there is something to protect."""
    return any((folder / name).exists() for name in (CHECKPOINT, METRICS, *MODEL))


def recorded_identity(folder: Path) -> Mapping[str, Any]:
    """What a run that has got somewhere wrote about itself; empty where there is none."""
    if not _has_begun(folder):
        return {}
    try:
        found = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recorded_config(folder: Path) -> Mapping[str, Any]:
    """The settings that a run was given; empty where there are none.

    Raises:
        TrainingError: the file is damaged.
    """
    return _read_mapping(folder / CONFIG, yaml.safe_load)


def student_folders(folder: Path) -> list[Path]:
    """The run folders in the folder of several students, in the order of their settings; empty for another folder.

    Raises:
        TrainingError: the file that lists them is damaged.
    """
    found = (folder / str(name) for name in _read_mapping(folder / STUDENTS, json.loads))
    return [one for one in found if one.is_dir()]


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TrainingError(f"{path}: cannot be read ({one_line(error)}); start again with --overwrite") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{path}: expected a mapping, found {type(found).__name__}; start again with --overwrite")
    return found


def is_finished(folder: Path) -> bool:
    return all((folder / name).exists() for name in MODEL)


def kept_folder(folder: Path, epoch: int) -> Path:
    """Return where the weights after an epoch are kept."""
    return folder / f"epoch-{epoch}"


def require_kept(folder: Path, epochs: Iterable[int], done: int) -> None:
    """Check that the weights after the epochs that are over were kept.

    Args:
        folder: of the run.
        epochs: after which weights are to be kept.
        done: epochs that are over.

    Raises:
        UsageError: they were not.
    """
    for epoch in epochs:
        if epoch <= done and not is_finished(kept_folder(folder, epoch)):
            raise UsageError(
                f"keep_epochs: expected the weights after epoch {epoch} in {kept_folder(folder, epoch)}, found none: "
                f"{folder} was begun without this option and has done {done} epochs; leave {epoch} out of "
                "--keep-epochs, or start again with --overwrite"
            )


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    path = folder / IDENTITY
    if (folder / "manifest.json").exists():
        raise UsageError(f"{folder}: holds a store of soft labels; use another --out")
    if (folder / STUDENTS).exists():
        raise UsageError(f"{folder}: holds the run folders of several students; use another --out")
    if not _has_begun(folder):
        path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    if not path.exists():
        found = [name for name in (CHECKPOINT, *MODEL, METRICS) if (folder / name).exists()]
        if found:
            raise UsageError(
                f"{folder}: holds {found[0]} of a run that is not known; use another --out, or --overwrite"
            )
        write_atomically(path, json.dumps(identity, indent=2).encode() + b"\n")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); use another --out, or --overwrite") from error
    new = json.loads(json.dumps(identity))
    differences = list_differences(earlier, new)
    if differences:
        raise MismatchError(
            f"{folder}: holds another run; {'; '.join(differences)}. Use another --out, or --overwrite to start again"
            f"{_to_go_on(folder, earlier, new)}"
        )


def list_differences(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, each in words."""
    return [
        f"{name}: {earlier.get(name)!r} there, {new.get(name)!r} here"
        for name in (*new, *(name for name in earlier if name not in new))
        if earlier.get(name) != new.get(name)
    ]


def _to_go_on(folder: Path, earlier: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How a run that is finished gets more epochs, where that may be what is wanted."""
    epochs = [identity.get("epochs") for identity in (earlier, new)]
    done, wanted = (number if isinstance(number, int) else 0 for number in epochs)
    if not is_finished(folder) or wanted <= done:
        return ""
    student = shlex.quote(f"run:{quote_path(str(folder))}")
    return (
        f"; or train its weights for {wanted - done} more epochs, as a run with a schedule of its own: the "
        f"same command with --student {student} --epochs {wanted - done} --out OTHER"
    )


def _clear(folder: Path) -> None:
    of_student = (BEST, PROJECTOR, BEST_PROJECTOR, TOKENIZER, *OF_TRANSFORMERS, *MODEL)
    for name in (CHECKPOINT, IDENTITY, CONFIG, METRICS, FAILED, TRACKER, *of_student):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / BOARD, ignore_errors=True)
    for kept in folder.glob("epoch-*"):
        if is_finished(kept):
            shutil.rmtree(kept)
