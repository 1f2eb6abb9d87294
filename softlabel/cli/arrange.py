"""Arguments of the command line as the parser takes them."""

from collections.abc import Sequence

from softlabel.errors import UsageError

_BOOLEANS = ("true", "false", "yes", "no", "on", "off")
_WITHOUT = ("--config", "--print_config", "--help", "-h")  # options that need no argument without an option beside them


def arrange_arguments(
    arguments: Sequence[str], repeatable: set[str], booleans: set[str], positional: Sequence[str]
) -> list[str]:
    """Rewrite arguments for the parser.

    ``--teacher A --teacher B`` becomes ``--teacher A B``; a bare ``--flag`` becomes ``--flag=true``, so that it does
    not take the next argument as its value. Arguments without an option that are missing are the last values of the
    option with several values, as in ``--fail-if CONDITION STORE``.

    Args:
        arguments: with the name of the command.
        repeatable: flags with several values.
        booleans: flags with a value of true or false.
        positional: names of the required arguments without an option.

    Raises:
        UsageError: an argument is missing, and options in several places may have taken it.
    """
    arranged: list[str] = []
    values: dict[str, list[str]] = {}
    taken: list[tuple[str, list[int]]] = []  # a flag, and the places in its values of those that followed it
    collecting: list[str] | None = None
    alone, is_value = 0, False
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in repeatable:
            if name not in values:
                arranged.append(name)
            collecting = values.setdefault(name, [])
            taken.append((name, []))
            if equals:
                collecting.append(value)
        elif collecting is not None and not argument.startswith("--"):
            taken[-1][1].append(len(collecting))
            collecting.append(argument)
        else:
            collecting = None
            bare = argument in booleans and "".join(arguments[number + 1 : number + 2]).lower() not in _BOOLEANS
            arranged.append(f"{argument}=true" if bare else argument)
            alone += not argument.startswith("-") and not is_value
            is_value = argument.startswith("--") and not equals and not bare
    missing = len(positional) + 1 - alone
    takers = [(name, places) for name, places in taken if len(places) > missing]
    # A file may have them, and help needs none.
    if takers and missing > 0 and not any(one.partition("=")[0] in _WITHOUT for one in arguments):
        if len(takers) > 1:
            listed = " or ".join(f"{name} took {values[name][places[-1]]!r}" for name, places in takers)
            raise UsageError(f"expected {positional[-1]}, not given: {listed}; give it before these options")
        ((name, places),) = takers
        first, last = places[-missing], places[-1] + 1
        front = next(place for place, one in enumerate(arranged) if one.startswith("-"))  # where no option takes them
        arranged[front:front] = values[name][first:last]
        del values[name][first:last]
    return [part for argument in arranged for part in (argument, *values.get(argument, ()))]
