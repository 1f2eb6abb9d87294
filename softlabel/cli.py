"""The command line: `softlabel COMMAND`. Builds the parser from the commands, runs one, turns errors into exit codes.

Every command takes ``--config FILE.yaml`` (flags override it) and ``--print_config``.

Exit codes: 0 done; 1 the work failed; 2 the request is wrong; 3 `verify` found damage; 130 interrupted, run it again.
"""

import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser

from softlabel import commands
from softlabel.errors import SoftLabelError

INTERRUPTED = 130

COMMANDS: dict[str, Callable[..., int]] = {
    "generate": commands.generate,
    "inspect": commands.inspect,
    "verify": commands.verify,
    "train": commands.train,
    "evaluate": commands.evaluate,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options(function: Callable[..., int]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _element(hint: Any) -> Any:
    """The element type of an option that takes a list (``list[str]``, ``Optional[list[float]]``), else None."""
    for candidate in (hint, *typing.get_args(hint)):
        if typing.get_origin(candidate) is list:
            return typing.get_args(candidate)[0]
    return None


def _subparser(function: Callable[..., int]) -> ArgumentParser:
    """A parser with an option a parameter; positional-only parameters are positional arguments."""
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    help_of = {param.arg_name: (param.description or "").replace("%", "%%") for param in doc.params}
    examples = "\n".join(f"  {line.strip()}" for e in doc.examples for line in (e.description or "").splitlines())
    parser = ArgumentParser(
        description=f"{doc.short_description}\n{doc.long_description or ''}".strip(), epilog=f"Example:\n{examples}"
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options; flags override it")
    hints = get_type_hints(function)
    for name, parameter in _options(function).items():
        hint = hints[name]
        required = parameter.default is inspect.Parameter.empty
        settings: dict[str, Any] = {"help": help_of[name]}
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            parser.add_argument(name, type=hint, **settings)
        elif hint is bool and parameter.default is False:
            parser.add_argument(_flag(name), action="store_true", **settings)
        else:
            if (element := _element(hint)) is not None:
                hint, settings["nargs"] = element, "+"
            settings |= {"required": True} if required else {"default": parameter.default}
            parser.add_argument(_flag(name), type=hint, **settings)
    return parser


def _join_repeats(arguments: Sequence[str], repeatable: set[str]) -> list[str]:
    """``--teacher A --teacher B`` means ``--teacher A B``, which is what the parser understands."""
    joined: list[str] = []
    values: dict[str, list[str]] = {}
    collecting: list[str] | None = None
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in repeatable:
            if name not in values:
                values[name] = []
                joined.append(name)
            collecting = values[name]
            if equals:
                collecting.append(value)
        elif collecting is not None and not argument.startswith("--"):
            collecting.append(argument)
        else:
            collecting = None
            joined.append(argument)
    return [part for argument in joined for part in (argument, *values.get(argument, ()))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="softlabel",
        description="Offline soft labels for knowledge distillation: run the teachers once, train from disk.",
    )
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, _subparser(function), help=(inspect.getdoc(function) or "").splitlines()[0])
    function_called = COMMANDS.get(arguments[0]) if arguments else None
    if function_called is not None:
        hints = get_type_hints(function_called)
        lists = {_flag(name) for name in _options(function_called) if _element(hints[name]) is not None}
        arguments = _join_repeats(arguments, lists)
    parsed = parser.parse_args(arguments)
    command = COMMANDS[parsed.subcommand]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    resolved = {name: value for name, value in parsed[parsed.subcommand].as_dict().items() if name != "config"}
    positional = [
        resolved.pop(name)
        for name, parameter in _options(command).items()
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    ]
    try:
        return command(*positional, **resolved)
    except SoftLabelError as error:
        print(f"softlabel: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("softlabel: interrupted; what is finished is kept, run the same command to resume", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error, and nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
