"""The error tree: every error that softlabel raises on purpose.

    SoftLabelError            exit code 1
    ├── UsageError            exit code 2: the request is wrong, change it
    │   ├── SpecError             a teacher, student or data SPEC that cannot be understood
    │   └── MismatchError         two things that must agree do not (store and run, store and student)
    ├── DataError             the dataset cannot be used
    │   ├── BadImageError         one image that cannot be decoded
    │   └── MissingKeyError       a sample without a row in the store
    ├── TeacherError          a teacher returned something that is not logits (NaN, wrong shape)
    ├── StoreError            a store that cannot be read or written
    │   ├── StoreNotFoundError    no store there (exit code 2)
    │   ├── StoreIncompleteError  its run has not finished (exit code 2)
    │   ├── StoreCorruptError     the bytes differ from what the manifest records
    │   └── StoreLockedError      another run is writing to it (exit code 2)
    ├── ClusterLostError      the scheduler is gone (exit code 75: rerun the command)
    └── TrainingError         training cannot continue (the loss is not finite)

A message names the subject, the expected value, the value found, and the remedy.
"""


def one_line(error: BaseException, *, with_type: bool = False, limit: int | None = 300) -> str:
    """Return an error's text on one line, cut to `limit` characters, or the name of its type where it has no text."""
    text = f"{type(error).__name__}: {error}" if with_type else str(error)
    return " ".join(text.split())[:limit] or type(error).__name__


class SoftLabelError(Exception):
    """Base class; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(SoftLabelError):
    exit_code = 2


class SpecError(UsageError):
    pass


class MismatchError(UsageError):
    pass


class DataError(SoftLabelError):
    pass


class BadImageError(DataError):
    pass


class MissingKeyError(DataError):
    pass


class TeacherError(SoftLabelError):
    pass


class StoreError(SoftLabelError):
    pass


class StoreNotFoundError(StoreError):
    exit_code = 2


class StoreIncompleteError(StoreError):
    exit_code = 2


class StoreCorruptError(StoreError):
    pass


class StoreLockedError(StoreError):
    exit_code = 2


class TrainingError(SoftLabelError):
    pass


class ClusterLostError(SoftLabelError):
    exit_code = 75  # EX_TEMPFAIL of sysexits.h
