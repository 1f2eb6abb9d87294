"""Text of strangers, such as class names and keys, as it is shown in a terminal or on a page."""

# Control characters move the cursor, begin a line or colour it; the others turn the direction of what follows.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_REPLACED = dict.fromkeys(_CONTROLS, "\ufffd")
_IN_LINES = {code: to for code, to in _REPLACED.items() if chr(code) not in "\n\t"}


def show_plainly(text: str, *, lines: bool = False) -> str:
    """Replace control characters, and those that turn the direction of text, by U+FFFD.

    Args:
        lines: the text is of several lines, whose ends and tabs stay.
    """
    return text.translate(_IN_LINES if lines else _REPLACED)
