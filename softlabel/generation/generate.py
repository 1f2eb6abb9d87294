"""Stage 1: plan minus manifest -> label_shards -> write_shard -> commit."""

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
    """Run teachers over a dataset and store their combined soft labels; the same call resumes an interrupted one.

    Args:
        data: a SOURCE (see `open_source`), or a map-style dataset of (image, label) or images.
        teachers: one SPEC per member of the ensemble, for example ``torchvision:resnet50@weights.pth``.
        out: folder of the store.
        key_fn: index -> key, for a map-style dataset; None: the decimal index.
        executor: labels the shards; None: in this process. `softlabel.cluster.DaskExecutor` uses a Dask cluster.
        preflight: label two batches first, check the free space of the disk, and warn about suspicious results.
        progress: show a bar; None: if standard error is a terminal.
        options: JSON values to keep in the manifest under `recorded.options`.
        **fields: of `GenerateConfig`: temperature, combine, encoding, batch_size, device and others.

    Returns:
        Counts and times of this call.

    Raises:
        UsageError: an argument is wrong (SpecError), or `out` holds another run's store (MismatchError).
        TeacherError: a member's output is not (B, C) finite numbers.
        DataError: the source cannot be read, or an image is bad and `on_bad_image` is ``error``.
        StoreError: the store cannot be written, or does not fit on its disk; committed shards stay.
    """
    config = GenerateConfig(**fields)
    with open_run(
        data, teachers=teachers, out=out, config=config, executor=executor, key_fn=key_fn, options=options
    ) as run:
        if preflight:
            run.preflight()
        return run.label(progress=progress)
