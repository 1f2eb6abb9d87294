"""Report a source in the first lines of every run."""

import logging

from softlabel.dataset.findings import list_classes
from softlabel.dataset.source import Source

log = logging.getLogger("softlabel")


def describe_source(source: Source) -> str:
    """Return the number of samples and of hard labels, the origin of the labels, and the classes."""
    count = len(source)
    text = f"{source.name}: {count:,} sample{'' if count == 1 else 's'}, "
    labelled = source.count_labelled()
    found = source.findings
    if labelled == 0:
        text += "none with a hard label"
        return text + (f" ({found.without_labels})" if found.without_labels else "")
    text += "hard labels come with the samples" if labelled is None else f"{labelled:,} with a hard label"
    if found.labels_from:
        text += f", from {found.labels_from}"
    return text + (f"; {list_classes(source.class_names)}" if source.class_names else "")


def report_source(source: Source) -> None:
    """Log `describe_source`, notes, and a warning for all data that was left out."""
    for part in source.parts():
        log.info("%s", describe_source(part))
        for note in part.findings.notes:
            log.info("%s: %s", part.name, note)
        for left_out in part.findings.left_out:
            log.warning("%s: %s", part.name, left_out)
