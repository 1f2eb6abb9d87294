"""Which options a SOURCE takes, checked before its data are read."""

from collections.abc import Iterable, Mapping

from softlabel.errors import SpecError

_LABELS = ("label", "labels", "classes")
_EVERYWHERE = ("rows", "fold", "without_fold", "fold_seed", "labelled", "exif", "bits")
ARRAY = ("inputs", "layout", "images", "labels", "keys", "classes")
_DOCUMENTS = ("messages", "tokens", "mask")
PARQUET = ("inputs", "text", "text_pair", *_DOCUMENTS, "image", "key", *_LABELS, "files")
TAR = ("image", "key", *_LABELS, "files")
FOLDER = ("labels", "classes", "files")
# Of a file with a row for each sample.
TABLE = ("inputs", "key", *_LABELS)
TEXT = ("text", "text_pair", "key", *_LABELS)
LIST = ("image", "root", *_LABELS)
CHAT = ("messages", "key")
TOKEN = ("tokens", "mask", "key")
ROWS = tuple(dict.fromkeys((*TABLE, *TEXT, *_DOCUMENTS, *LIST)))


def check_options(options: Mapping[str, str], takes: Iterable[str], what: str, *, subject: str) -> None:
    """Check the names of a SOURCE's options, and that each has a value.

    Args:
        options: of the SOURCE.
        takes: the names that `what`, which begins a clause, has.
        subject: the SOURCE, for errors.

    Raises:
        SpecError: an option is unknown, or has no value.
    """
    takes = tuple(takes)
    if unknown := [option for option in options if option not in takes]:
        listed = ", ".join((*takes, *_EVERYWHERE))
        raise SpecError(f"{subject}: unknown option {', '.join(unknown)}; {what} takes {listed}")
    if empty := next((option for option, value in options.items() if not value), None):
        raise SpecError(f"{subject}: {empty}=: expected a value, found nothing; give one, or leave {empty}= out")


def check_form(options: Mapping[str, str], *, subject: str) -> None:
    """Check that the options of a file with a row for each sample go together.

    Raises:
        SpecError: one is for another form of samples.
    """
    takes: tuple[str, ...]
    if "inputs" in options:
        if options.keys() & {"image", "text", "text_pair", *_DOCUMENTS}:
            return  # `find_columns` says that there can be one form
        takes, form = TABLE, "a table of numbers (inputs=)"
    elif "messages" in options:
        takes, form = CHAT, "a table of chats (messages=)"
    elif options.keys() & set(_DOCUMENTS):
        takes, form = TOKEN, "a table of token ids (tokens=)"
    elif options.keys() & {"text", "text_pair"}:
        takes, form = TEXT, "a table of texts (text=)"
    else:
        takes, form = LIST, "a list of image files"
    if odd := next((option for option in options if option not in takes), None):
        raise SpecError(
            f"{subject}: {odd}= is not an option of {form}, which takes {', '.join(takes)}; leave it out, or choose "
            "the form of the samples with inputs= (numbers), text=, messages= or tokens="
        )


def name_keys(options: dict[str, str], *, subject: str) -> None:
    """Take ``id=COLUMN`` of documents, which is what their data sets call it, as ``key=COLUMN``.

    Raises:
        SpecError: both are given.
    """
    if "id" not in options:
        return
    if "key" in options:
        raise SpecError(f"{subject}: id= and key= both name the column of the keys; leave one of them out")
    options["key"] = options.pop("id")
