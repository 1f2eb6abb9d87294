"""What every test may ask for."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What stores keep in the user's cache folder is kept apart, by the processes that a test starts too."""
    os.environ["SOFTLABEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real CIFAR-10 images and real pretrained teachers; the test skips where there is none."""
    folder = Path(os.environ.get("SOFTLABEL_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "cifar10-jpeg" / "test.parquet").is_file():
        pytest.skip(f"no CIFAR-10 images and teachers in {folder}; set SOFTLABEL_DATA to a folder that has them")
    return folder.resolve()
