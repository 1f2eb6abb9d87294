"""Chats: conversations that a chat template renders as one text, with the parts that the assistant wrote.

A template is rendered in jinja's sandbox as transformers does, but for `strftime_now`, which is left out: with the date
in it the same chat would be other tokens tomorrow.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.sandbox

from softlabel.errors import BadImageError, DataError, SpecError, one_line
from softlabel.inputs.text import TextKind

# A message: role, content, and what else its template reads.
Messages = Sequence[Mapping[str, Any]]
# Beginning and end of a part of a text, in characters.
Span = tuple[int, int]


class ChatKind(TextKind):
    """A conversation, as the JSON text of its messages; the content hash is of this text."""

    name: ClassVar[str] = "chat"
    unit: ClassVar[str] = "chat"
    noun: ClassVar[str] = "chats"


CHATS = ChatKind()


def dump_messages(messages: object) -> str | None:
    """The messages of a chat as JSON text, without fields that are null; None for no message at all.

    Raises:
        ValueError: they are no list of messages with role and content.
    """
    if messages is None:
        return None
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        return None
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            listed = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
            raise ValueError(f"expected messages of the form {{'role': ..., 'content': ...}}, found {listed}")
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(f"expected the content of a message as text, found {type(message['content']).__name__}")
        found.append(_drop_nulls(message))
    return json.dumps(found, ensure_ascii=False)


def _drop_nulls(value: Any) -> Any:
    # Parquet has every field in every row: a null there is a field that JSON leaves out.
    if isinstance(value, Mapping):
        return {key: _drop_nulls(one) for key, one in value.items() if one is not None}
    return [_drop_nulls(one) for one in value] if isinstance(value, list) else value


class ChatTemplate:
    """A chat template. It can be pickled.

    Attributes:
        source: in jinja's language.
        special: the special tokens by the names that the template has for them.
        fingerprint: SHA-256 of both.
        marks_turns: whether it marks what the assistant says with ``{% generation %}``.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source, self.special = source, dict(special)
        self.fingerprint = hashlib.sha256(json.dumps([source, sorted(self.special.items())]).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self.special)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise SpecError(f"chat template: line {error.lineno}: {one_line(error)}") from error

    @cached_property
    def marks_turns(self) -> bool:
        environment = self._compiled.environment
        return any(
            isinstance(call.node, jinja2.nodes.ExtensionAttribute)
            for call in environment.parse(self.source).find_all(jinja2.nodes.Call)
        )

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text of a chat, and the spans in it that the template marks as the assistant's.

        Raises:
            BadImageError: the template refuses these messages.
        """
        spans: list[Span] = []
        blocks: list[str] = []
        try:
            for block in self._compiled.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{_SPANS: spans, _BLOCKS: blocks},
                **self.special,
            ):
                blocks.append(block)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise BadImageError(f"the chat template fails: {one_line(error)}") from error
        return "".join(blocks), spans

    def render_turns(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text of a chat, and the spans of it that are the assistant's turns.

        A template that marks none is asked for the chat up to each turn, and up to its end.

        Raises:
            BadImageError: the template refuses these messages.
            DataError: what comes before a turn reads otherwise in the whole chat.
        """
        whole, spans = self.render(messages)
        return whole, spans if self.marks_turns else list(self._find_turns(whole, messages))

    def _find_turns(self, whole: str, messages: Messages) -> Iterator[Span]:
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self.render(messages[:place], add_generation_prompt=True) if place else ("", [])
            until, _ = self.render(messages[: place + 1])
            if not (until.startswith(before) and whole.startswith(until)):
                raise DataError(
                    f"chat template: expected that the chat up to message {place + 1} is the beginning of the whole "
                    "chat, found that the template writes it in another way there; mark what the assistant says with "
                    "{% generation %} and {% endgeneration %} in the template"
                )
            yield len(before), len(until)


_SPANS, _BLOCKS = "_softlabel_spans", "_softlabel_blocks"


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: notes where its text lies."""

    tags = {"generation"}  # noqa: RUF012  # an instance variable of jinja's class

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        names: list[Any] = [jinja2.nodes.ContextReference()]
        return jinja2.nodes.CallBlock(self.call_method("note", names), [], [], body).set_lineno(line)

    def note(self, context: Any, caller: Any) -> str:
        text: str = caller()
        start = sum(map(len, context[_BLOCKS]))
        context[_SPANS].append((start, start + len(text)))
        return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes what HTML would read.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
