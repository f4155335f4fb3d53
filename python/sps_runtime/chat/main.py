"""``sps chat``: options, and the loop of questions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from sps_runtime.chat.conversation import Conversation
from sps_runtime.chat.display import Display
from sps_runtime.chat.stream import ChatError, Endpoint

HELP = """\
/file PATH   put a document before the next question
/new         forget what was said
/help        this
/quit        leave; so does the end of input. Ctrl-C breaks an answer off."""

Read = Callable[[str], str]


def main(arguments: Sequence[str]) -> int:
    """Ask questions; the exit status."""
    options = _parser().parse_args(arguments)
    talk = Conversation(
        Endpoint(options.url, options.api_key),
        {
            "model": options.model,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            **({"attention": {"mode": options.attention}} if options.attention else {}),
        },
        options.system,
    )
    display = Display(notes=None if options.quiet else sys.stderr)
    try:
        for path in options.file:
            attach(talk, path)
        if options.question:
            answer(talk, display, " ".join(options.question))
            return 0
    except (ChatError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    converse(talk, display, input)
    return 0


def converse(talk: Conversation, display: Display, read: Read) -> None:
    """Questions and commands until the input ends; what fails is said and the talk goes on."""
    while True:
        try:
            line = read("> ").strip()
            if line == "/quit":
                return
            if line:
                obey(talk, display, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except (ChatError, OSError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)


def obey(talk: Conversation, display: Display, line: str) -> None:
    """Run a command, or ask."""
    command, _, rest = line.partition(" ")
    if command == "/file":
        attach(talk, rest.strip())
    elif command == "/new":
        talk.forget()
    elif command.startswith("/"):
        print(HELP, file=sys.stderr)
    else:
        answer(talk, display, line)


def attach(talk: Conversation, path: str) -> None:
    """Put a file's text before the next question, behind others that wait there.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is no text.
    """
    text = Path(path).expanduser().read_text(encoding="utf-8")
    talk.document = f"{talk.document}\n\n{text}" if talk.document else text


def answer(talk: Conversation, display: Display, question: str) -> None:
    """Ask and show; a question that is broken off also ends at the server."""
    with closing(talk.ask(question)) as events:
        display.show(events)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sps chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{HELP}",
    )
    add = parser.add_argument
    add("question", nargs="*", help="ask only this and leave; without it, questions are read")
    add("--url", default="http://127.0.0.1:30000", help="of the server")
    add("--api-key", default="", metavar="KEY")
    add("--model", default="default", metavar="NAME")
    add("--file", action="append", default=[], metavar="PATH", help="a document to ask of")
    add("--system", default="", metavar="TEXT", help="the system message")
    add("--max-tokens", type=int, default=512, metavar="N", help="of an answer")
    add("--temperature", type=float, default=0.0, metavar="T")
    add("--attention", choices=("exact", "csa"), help="else as the server is set")
    add("--quiet", action="store_true", help="answers only: no bar, no closing line")
    return parser
