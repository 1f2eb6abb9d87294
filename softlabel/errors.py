"""The error tree: every error that softlabel raises on purpose.

    SoftLabelError            exit code 1
    ├── UsageError            exit code 2: the request is wrong, change it
    │   ├── SpecError             a teacher, student or data SPEC that cannot be understood
    │   └── MismatchError         two things that must agree do not (store and run, store and student)
    ├── DataError             the dataset cannot be used as it is
    │   ├── BadImageError         one image that cannot be decoded
    │   └── MissingKeyError       a sample without a row in the store
    ├── TeacherError          a teacher gave something that is not logits (NaN, wrong shape)
    ├── StoreError            a store that cannot be read or written
    │   ├── StoreNotFoundError    nothing there (exit code 2)
    │   ├── StoreIncompleteError  its run has not finished (exit code 2)
    │   ├── StoreCorruptError     bytes are not those that the manifest promises
    │   └── StoreLockedError      another run is writing to it (exit code 2)
    ├── ClusterLostError      the scheduler is gone (exit code 75: run the same command again)
    └── TrainingError         a student whose training cannot go on (a loss that is not finite)

A message names the subject, what was expected, what was found, and the remedy.
"""


class SoftLabelError(Exception):
    """Base of all of them; the command line prints its message and leaves with `exit_code`."""

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
