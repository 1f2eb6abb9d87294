"""Stage 1: the teachers label a dataset, once.

plan minus manifest -> label_shards -> write_shard -> commit
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.dataset import Source
from softlabel.generation.config import GenerateConfig
from softlabel.generation.executor import Executor
from softlabel.generation.run import GenerateSummary, open_run


@check_arguments
def generate(
    data: "str | Path | Source | Dataset[Any]",
    *,
    teachers: Sequence[str],
    out: str | Path,
    key_fn: Callable[[int], str | int] | None = None,
    executor: Executor | None = None,
    preflight: bool = True,
    progress: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> GenerateSummary:
    """Run teachers over a dataset and store their combined soft labels; resumes what an earlier call left unfinished.

    Args:
        data: a SOURCE (see `open_source`), or a map-style dataset of (image, label) or images.
        teachers: one SPEC for each member of the ensemble, such as ``torchvision:resnet50@weights.pth``.
        out: folder of the store.
        key_fn: index -> key, for a map-style dataset; the decimal index when absent.
        executor: who labels; absent: this process. `softlabel.cluster.DaskExecutor` labels on a Dask cluster.
        preflight: label two batches first, check that the disk has room, and warn of what looks wrong.
        progress: show a bar; absent: if standard error is a terminal.
        options: as JSON takes it: what the caller was given, kept in the manifest under `recorded.options`.
        **fields: of `GenerateConfig`: temperature, combine, encoding, batch_size, device and the others.

    Returns:
        Counts and times of this call.

    Raises:
        UsageError: a request that cannot be (SpecError, MismatchError: `out` holds another run's store).
        TeacherError: a member's output is not (B, C) finite numbers.
        DataError: a source that cannot be read, or a bad image if `on_bad_image` is ``error``.
        StoreError: the store cannot be written, or would not fit on its disk; what was committed stays and the same
            call resumes.
    """
    config = GenerateConfig(**fields)
    with open_run(
        data, teachers=teachers, out=out, config=config, executor=executor, key_fn=key_fn, options=options
    ) as run:
        if preflight:
            run.preflight()
        return run.label(progress=progress)
