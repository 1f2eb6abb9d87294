"""The command line: `softlabel COMMAND`. Builds the parser from the commands, runs one, turns errors into exit codes.

Every command takes ``--config FILE.yaml`` (flags override it) and ``--print_config``.

Exit codes: 0 done; 1 the work failed; 2 the request is wrong; 3 `verify` found damage; 130 interrupted, run it again.
"""

import importlib
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from softlabel.commands import algebra, label, store, student
from softlabel.errors import SoftLabelError

INTERRUPTED = 130

COMMANDS: dict[str, Callable[..., int]] = {
    "plan": label.plan,
    "calibrate": label.calibrate,
    "generate": label.generate,
    "inspect": store.inspect,
    "verify": store.verify,
    "repair": store.repair,
    "extend": store.extend,
    "combine": algebra.combine,
    "merge": algebra.merge,
    "convert": algebra.convert,
    "export": algebra.export,
    "train": student.train,
    "evaluate": student.evaluate,
}
# A command whose only parameter is a dataclass has the dataclass's fields as options: (module, name).
CONFIGS = {"train": ("softlabel.train", "TrainConfig")}
POSITIONAL = inspect.Parameter.POSITIONAL_ONLY


class _Options:
    """The options of a command: its parameters, or the fields of the dataclass that is its only parameter."""

    def __init__(self, name: str) -> None:
        command = self.command = COMMANDS[name]
        self.dataclass: Any = None
        if name in CONFIGS:
            module, attribute = CONFIGS[name]
            self.dataclass = getattr(importlib.import_module(module), attribute)
        described = self.dataclass or command
        self.hints: dict[str, Any] = get_type_hints(described)
        self.parameters = dict(inspect.signature(described).parameters)
        self.doc = docstring_parser.parse(inspect.getdoc(command) or "")
        texts = docstring_parser.parse(inspect.getdoc(described) or "").params
        self.help = {text.arg_name: " ".join((text.description or "").split()).replace("%", "%%") for text in texts}

    def lists(self) -> set[str]:
        """The flags that take several values."""
        return {_flag(name) for name in self.parameters if _element(self.hints[name]) is not None}

    def parser(self) -> ArgumentParser:
        examples = "\n".join(
            f"  {line.strip()}" for e in self.doc.examples for line in (e.description or "").splitlines()
        )
        parser = ArgumentParser(
            allow_abbrev=False,
            description=f"{self.doc.short_description}\n\n{self.doc.long_description or ''}".strip(),
            epilog=f"Example:\n{examples}",
        )
        parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options; flags override it")
        for name, parameter in self.parameters.items():
            hint = self.hints[name]
            settings: dict[str, Any] = {"help": self.help[name]}
            if parameter.kind is POSITIONAL:
                if (element := _element(hint)) is not None:
                    hint = element
                    settings["nargs"] = "+"
                parser.add_argument(name, type=hint, **settings)
            elif hint is bool and parameter.default is False:
                parser.add_argument(_flag(name), action="store_true", **settings)
            else:
                required = parameter.default is inspect.Parameter.empty
                settings |= {"required": True} if required else {"default": parameter.default}
                if (element := _element(hint)) is not None:
                    hint = element
                    settings["nargs"] = "+"
                parser.add_argument(_flag(name), type=hint, **settings)
        return parser

    def run(self, values: dict[str, Any]) -> int:
        if self.dataclass is not None:
            return self.command(self.dataclass(**values))
        positional = [values.pop(name) for name, p in self.parameters.items() if p.kind is POSITIONAL]
        return self.command(*positional, **values)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _element(hint: Any) -> Any:
    """The element type of an option that takes a list (``list[str]``, ``list[float] | None``), else None."""
    for candidate in (hint, *typing.get_args(hint)):
        if typing.get_origin(candidate) is list:
            return typing.get_args(candidate)[0]
    return None


def _join_repeats(arguments: Sequence[str], repeatable: set[str]) -> list[str]:
    """``--teacher A --teacher B`` means ``--teacher A B``, which is what the parser understands."""
    joined: list[str] = []
    values: dict[str, list[str]] = {}
    collecting: list[str] | None = None
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in repeatable:
            if name not in values:
                joined.append(name)
            collecting = values.setdefault(name, [])
            if equals:
                collecting.append(value)
        elif collecting is not None and not argument.startswith("--"):
            collecting.append(argument)
        else:
            collecting = None
            joined.append(argument)
    return [part for argument in joined for part in (argument, *values.get(argument, ()))]


def _parser(chosen: _Options | None, name: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog="softlabel",
        allow_abbrev=False,
        description="Offline soft labels for knowledge distillation: run the teachers once, train from disk.",
    )
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for other, command in COMMANDS.items():
        # Only the chosen command's options are built: some need torch, and `softlabel --help` should not wait for it.
        subparser = chosen.parser() if chosen is not None and other == name else ArgumentParser()
        subcommands.add_subcommand(other, subparser, help=(inspect.getdoc(command) or "").splitlines()[0])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        chosen = _Options(name) if name in COMMANDS else None
        parsed = _parser(chosen, name).parse_args(_join_repeats(arguments, chosen.lists()) if chosen else arguments)
        assert chosen is not None, "without a known command the parser has left the program"
        return chosen.run({key: value for key, value in parsed[name].as_dict().items() if key != "config"})
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
