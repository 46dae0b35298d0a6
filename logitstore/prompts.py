"""`--prompt-template`: the words around a row's prompt, put there before it is tokenised.

Stands between the documents and the sequences. A teacher and a student may be asked in different words; what they are
to say, and learn, stays the row's own.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from logitstore.documents import Document, format_of
from logitstore.errors import ConfigError, DatasetError

PLACE = "{input}"
"""Where in a template the row's prompt stands."""


def read_template(template: str | None, flag: str) -> str | None:
    """The template; None where it says no more than the prompt.

    Raises:
        ConfigError: it has no place for the prompt.
    """
    if template is not None and PLACE not in template:
        raise ConfigError(
            f"{flag} is {template!r} and has no place for the prompt, expected {PLACE} in it; "
            f"type {flag} 'Answer briefly. {PLACE}'"
        )
    return None if template == PLACE else template


def prompted(documents: Iterable[Document], template: str | None) -> Iterator[Document]:
    """The documents, their prompt in the template's place: that of {"prompt", "completion"}, or what was said last
    before the assistant's last turn, where that ends the messages.

    Raises:
        DatasetError: a row without such a prompt (on its turn).
    """
    for document in documents:
        yield document if template is None else Document(_prompted(document, template), document.where)


def _prompted(document: Document, template: str) -> dict[str, Any]:
    row = dict(document.row)
    match format_of(row):
        case "completion":
            return row | {"prompt": template.replace(PLACE, row["prompt"])}
        case "messages":
            return row | {"messages": _turns(row["messages"], template, document.where)}
        case _:
            raise DatasetError(
                f"{document.where}: found a text, expected a prompt for the prompt template; "
                'use rows of {"prompt", "completion"} or {"messages"}, or leave the template out'
            )


def _turns(messages: Sequence[dict[str, Any]], template: str, where: str) -> list[dict[str, Any]]:
    roles = [message["role"] for message in messages]
    if roles[-2:] != ["user", "assistant"] or not isinstance(messages[-2].get("content"), str):
        raise DatasetError(
            f"{where}: the messages end with {' and '.join(roles[-2:])}, expected a user's text and the assistant's "
            "answer, for the prompt template; leave the row or the template out"
        )
    asked = messages[-2] | {"content": template.replace(PLACE, messages[-2]["content"])}
    return [*messages[:-2], asked, messages[-1]]
