"""Internals of tarfile that we use (Python 3.11 to 3.13): an archive keeps a record of every member."""

import tarfile


def forget_members(archive: tarfile.TarFile) -> None:
    """Drop the records of members that were read (1 GB for a million); `TarFile.next` continues after the last."""
    archive.members.clear()  # type: ignore[attr-defined]
