"""The command line `softlabel COMMAND`: builds the parser from the commands, runs one, turns errors into exit codes.

Every command takes ``--config FILE.yaml`` (flags override it) and ``--print_config``.

Exit codes: 0 done; 1 the work failed; 2 the request is wrong; 3 `verify` found damage, or a condition of `report` is
true; 75 a cluster's scheduler was lost, 130 interrupted (Ctrl-C) and 143 terminated (SIGTERM): rerun the command.
"""

import argparse
import dataclasses
import importlib
import inspect
import io
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter  # type: ignore[attr-defined]

import softlabel
from softlabel.cli import convert, generate, store, train
from softlabel.cli.arrange import arrange_arguments
from softlabel.common.arguments import check_values, describe, is_plain
from softlabel.common.plain_text import show_plainly
from softlabel.errors import SoftLabelError, UsageError

INTERRUPTED, TERMINATED = 130, 143

COMMANDS: dict[str, Callable[..., int]] = {
    "plan": generate.plan,
    "calibrate": generate.calibrate,
    "generate": generate.generate,
    "inspect": store.inspect,
    "verify": store.verify,
    "repair": store.repair,
    "extend": store.extend,
    "combine": convert.combine,
    "merge": convert.merge,
    "convert": convert.convert,
    "export": convert.export,
    "train": train.train,
    "crossfit": train.crossfit,
    "tune": train.tune,
    "evaluate": train.evaluate,
    "report": store.report,
}
# Commands that keep nothing of what they did before they were interrupted.
_UNKEPT = {"plan", "calibrate", "inspect", "verify", "evaluate", "report"}
# Dataclasses in annotations of commands, imported only when the command runs.
LATE = {
    "train": {"TrainConfig": "softlabel.training.TrainConfig"},
    "crossfit": {
        "TrainingOptions": "softlabel.cli.crossfit_options.OfTraining",
        "LabellingOptions": "softlabel.cli.crossfit_options.OfLabels",
        "EncodingOptions": "softlabel.cli.encoding_options.OfFolds",
    },
    "tune": {
        "TuneConfig": "softlabel.training.tune_config.TuneConfig",
        "TrainingOptions": "softlabel.cli.tune_options.OfTuning",
    },
    "generate": {
        "GenerateConfig": "softlabel.generation.config.GenerateConfig",
        "EncodingOptions": "softlabel.cli.encoding_options.OfTeachers",
    },
    "plan": {"LabelConfig": "softlabel.generation.config.LabelConfig"},
    "convert": {"EncodingOptions": "softlabel.cli.encoding_options.OfStores"},
}
# Commands whose options have values that depend on others.
_FILL = {"train": train.fill_options}
# (option, value) -> why a command refuses a value that others take.
_REASONS = {
    (
        "encoding",
        "head",
    ): " (labels cannot be encoded as head afterwards, a store of head neither: 'softlabel generate' alone writes it)"
}
POSITIONAL = inspect.Parameter.POSITIONAL_ONLY


class _Help(DefaultHelpFormatter):
    """Shows help texts unchanged, and does not wrap lines that begin with a space, which are commands."""

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines()]
        return "\n".join(indent + line for line in lines)


class _Parser(ArgumentParser):
    """Reports an error in one line, in terms of the command line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    # Options -> values of those that are absent, and comments; for --print_config.
    fill: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]] | None = None
    lists: frozenset[str] = frozenset()  # options with several values, as named in a file
    positional: frozenset[str] = frozenset()
    hints: Mapping[str, Any] = {}

    def parse_string(self, content: Any, *args: Any, **settings: Any) -> Any:
        """Parse a file, in which a list of one may be written without brackets."""
        try:
            loaded = yaml.safe_load(content)
        except yaml.YAMLError:
            loaded = None  # the parser reports the error
        alone = {
            name: value
            for name, value in (loaded.items() if isinstance(loaded, dict) else ())
            if name in self.lists and value is not None and not isinstance(value, list)
        }
        if alone:
            content = yaml.safe_dump({**loaded, **{name: [value] for name, value in alone.items()}}, sort_keys=False)
        return super().parse_string(content, *args, **settings)

    def dump(self, cfg: Any, **settings: Any) -> str:
        """Write options as --print_config shows them, with what stands for those that are absent."""
        comments: list[str] = []
        if self.fill is not None:
            filled, comments = self.fill({name: value for name, value in cfg.as_dict().items() if name != "config"})
            cfg = cfg.clone()
            for name, value in filled.items():
                cfg[name] = [value] if name in self.lists and value is not None else value
        return "".join(f"# {line}\n" for line in comments) + str(super().dump(cfg, **settings))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            command = f"softlabel {found[1].partition('.')[0]}"
            names = [name.partition(".")[2] or name for name in found[1].split(", ")]
            named = [name if name in self.positional or name == found[1] else _make_flag(name) for name in names]
            message = f"expected {', '.join(named)}, not given"
        message = re.sub(r'expected "subcommand".*', "expected a COMMAND, not given", message)
        message = " ".join(message.split())
        found = re.fullmatch(r'Parser key "(\w+)"[^:]*: .*(?:Got|Given) value: (.*)', message)
        if found and is_plain(hint := parser.hints.get(found[1])):
            message = f"{_make_flag(found[1])}: expected {describe(_get_element(hint) or hint)}, found {found[2]!r}"
            message += _REASONS.get((found[1], found[2]), "")
        message = re.sub(r'Parser key "(\w+)":', lambda key: f"{_make_flag(key[1])}:", message)
        print(f"softlabel: {message}; see '{command} --help'", file=sys.stderr)
        self.exit(2)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C with its own exit code."""


class _Options:
    """The options of a command: its parameters, with a dataclass replaced by its fields."""

    def __init__(self, name: str) -> None:
        command = self.command = COMMANDS[name]
        self.fill = _FILL.get(name)
        late = {}
        for annotation, place in LATE.get(name, {}).items():
            module, _, attribute = place.rpartition(".")
            late[annotation] = getattr(importlib.import_module(module), attribute)
        hints = get_type_hints(command, localns=late)
        self.doc = docstring_parser.parse(inspect.getdoc(command) or "")
        self.hints: dict[str, Any] = {}
        self.parameters: dict[str, inspect.Parameter] = {}
        self.help = _describe(command)
        # Parameters that are dataclasses -> their options. Of two fields with one name, the later is the option.
        self.groups: dict[str, tuple[Any, list[str]]] = {}
        own = inspect.signature(command).parameters
        taken = {name for name in own if not dataclasses.is_dataclass(hints[name])}
        for parameter in reversed(own):
            if parameter not in taken:
                fields = [field for field in inspect.signature(hints[parameter]).parameters if field not in taken]
                self.groups[parameter] = hints[parameter], fields
                taken |= set(fields)
        for parameter, one in own.items():
            if parameter not in self.groups:
                self.parameters[parameter], self.hints[parameter] = one, hints[parameter]
                continue
            group, fields = self.groups[parameter]
            for kind in reversed(group.__mro__):
                self.help |= {name: text for name, text in _describe(kind).items() if name in fields}
            of_group = get_type_hints(group)
            self.parameters |= {field: inspect.signature(group).parameters[field] for field in fields}
            self.hints |= {field: _reduce_to_text(of_group[field]) for field in fields}

    def lists(self) -> set[str]:
        """Return the flags with several values."""
        return {_make_flag(name) for name in self.parameters if _get_element(self.hints[name]) is not None}

    def booleans(self) -> set[str]:
        """Return the flags with a value of true or false."""
        return {_make_flag(name) for name in self.parameters if _list_choices(self.hints[name]) == ("true", "false")}

    def positional(self) -> list[str]:
        """Return the names of the arguments without an option."""
        return [name for name, one in self.parameters.items() if one.kind is POSITIONAL]

    def parser(self) -> _Parser:
        examples = "\n".join(
            f"  {line.strip()}" for e in self.doc.examples for line in (e.description or "").splitlines()
        )
        parser = _Parser(
            description=f"{self.doc.short_description}\n\n{self.doc.long_description or ''}".strip(),
            epilog=f"Example:\n{examples}",
        )
        parser.hints, parser.fill = self.hints, self.fill
        parser.lists = frozenset(name for name in self.parameters if _get_element(self.hints[name]) is not None)
        parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options; flags override it")
        for name, parameter in self.parameters.items():
            hint, default = self.hints[name], parameter.default
            settings: dict[str, Any] = {}
            text = self.help[name]
            if (element := _get_element(hint)) is not None:
                hint = element
                settings["nargs"] = "+"
            if parameter.kind is not POSITIONAL:
                if (choices := _list_choices(hint)) is not None:
                    settings["metavar"] = f"{{{','.join(choices)}}}"
                if _make_flag(name) in self.booleans():
                    settings |= {"nargs": "?", "const": True}
                if default is inspect.Parameter.empty:
                    settings["required"] = True
                    text += " (required)"
                else:
                    if default is not None and default is not False:
                        text += f" (default: {str(default).lower() if default is True else default})"
                    listed = element is not None and default is not None and not isinstance(default, list)
                    settings["default"] = [default] if listed else default  # one value or several
            # Set afterwards, because some versions of argparse format the text at once, with its percent signs.
            argument = name if parameter.kind is POSITIONAL else _make_flag(name)
            parser.add_argument(argument, type=hint, **settings).help = text
        return parser

    def run(self, values: dict[str, Any]) -> int:
        # The parser accepts null for every type.
        check_values(values, self.hints)
        values = {name: _expand_home(value) for name, value in values.items()}
        for parameter, (group, fields) in self.groups.items():
            values[parameter] = group(**{field: values[field] for field in fields})
        taken = {field for _, fields in self.groups.values() for field in fields}
        values = {name: value for name, value in values.items() if name not in taken}
        positional = [values.pop(name) for name in self.positional()]
        return self.command(*positional, **values)


def _reduce_to_text(hint: Any) -> Any:
    """Reduce a type hint that also allows objects to text, as options are."""
    kinds = typing.get_args(hint)
    if is_plain(hint) or str not in kinds:
        return hint
    return str | None if type(None) in kinds else str


def _describe(described: Any) -> dict[str, str]:
    """Return the help of each parameter or field, from a docstring."""
    texts = docstring_parser.parse(described.__doc__ or "").params
    return {text.arg_name: " ".join((text.description or "").split()) for text in texts}


def _expand_home(value: Any) -> Any:
    """Expand a leading `~`, which a shell does not do in `--out=~/runs` nor in a file."""
    if isinstance(value, list):
        return [_expand_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _make_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _list_choices(hint: Any) -> Sequence[str] | None:
    """Return the choices of an option; None if it is not a choice."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    if len(kinds) != 1:
        return None
    return ("true", "false") if kinds[0] is bool else [str(value) for value in typing.get_args(kinds[0])] or None


def _get_element(hint: Any) -> Any:
    """Return the element type of a list option (``list[str]``, ``list[float] | None``), else None."""
    for candidate in (hint, *typing.get_args(hint)):
        if typing.get_origin(candidate) in (list, Sequence):
            return typing.get_args(candidate)[0]
    return None


def _make_parser(chosen: _Options | None, name: str) -> ArgumentParser:
    parser = _Parser(
        prog="softlabel",
        description="Offline soft labels for knowledge distillation: run the teachers once, train from disk.",
    )
    parser.add_argument("--version", action="version", version=f"softlabel {softlabel.__version__}", help="show it")
    if chosen is not None:
        parser.positional = frozenset(chosen.positional())
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for other, command in COMMANDS.items():
        # Build only the chosen command's options: some need torch, which `softlabel --help` should not import.
        subparser = chosen.parser() if chosen is not None and other == name else ArgumentParser()
        subcommands.add_subcommand(other, subparser, help=(inspect.getdoc(command) or "").splitlines()[0])
    return parser


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Raise `_Terminated` on SIGTERM during the block, only in this process and thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked child
            os._exit(TERMINATED)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _BesideBars(logging.StreamHandler[Any]):
    """Writes lines to standard error, above a progress bar if there is one.

    A StreamHandler, so that tqdm's redirection of console handlers replaces it.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # without a stream of its own

    @property
    def stream(self) -> Any:
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(show_plainly(self.format(record), lines=True), file=sys.stderr)
        except Exception:
            self.handleError(record)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Escape names that the locale cannot encode, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    name = arguments[0] if arguments else ""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_BesideBars()])
    logging.getLogger("softlabel").setLevel(logging.INFO)  # but not the messages of other libraries
    try:
        chosen = _Options(name) if name in COMMANDS else None
        if chosen is not None:
            arguments = arrange_arguments(arguments, chosen.lists(), chosen.booleans(), chosen.positional())
        parsed = _make_parser(chosen, name).parse_args(arguments)
        assert chosen is not None, "the parser exits without a known command"
        with _raising_on_sigterm():
            return chosen.run({key: value for key, value in parsed[name].as_dict().items() if key != "config"})
    except SoftLabelError as error:
        print(f"softlabel: {show_plainly(str(error), lines=True)}", file=sys.stderr)
        return error.exit_code
    except UnicodeError as error:
        if sys.getfilesystemencoding().lower() == "utf-8":
            raise
        print(
            f"softlabel: expected names in the encoding of the locale, {sys.getfilesystemencoding()}, found: {error}; "
            "start with PYTHONUTF8=1 in the environment if names are UTF-8",
            file=sys.stderr,
        )
        return UsageError.exit_code
    except KeyboardInterrupt as error:
        ended, code = ("terminated", TERMINATED) if isinstance(error, _Terminated) else ("interrupted", INTERRUPTED)
        kept = (
            f"{name} keeps nothing, rerun it"
            if name in _UNKEPT
            else "finished work is kept, rerun the command to resume"
        )
        print(f"softlabel: {ended}; {kept}", file=sys.stderr)
        return code
    except BrokenPipeError:
        # The reader of our output has exited (`| head`), which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
