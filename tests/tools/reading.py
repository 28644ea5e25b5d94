"""What the tests here make of a parser's events."""

from __future__ import annotations

import random
from collections.abc import Iterable

from minivllm.tools.events import Arguments, CallStarted, Content, ToolCallParser

Read = tuple[str, list[tuple[str, str]]]
"""Content, and each call's name and arguments."""


def read(parser: ToolCallParser, pieces: Iterable[str]) -> Read:
    """Everything that a parser finds; checks that its events come in an order that makes sense."""
    content, names, arguments, ids = "", [], [], set()
    for events in (*(parser.push(piece) for piece in pieces), parser.finish()):
        for event in events:
            if isinstance(event, Content):
                assert event.text
                content += event.text
            elif isinstance(event, CallStarted):
                assert event.index == len(names)
                assert event.id.startswith("call_")
                ids.add(event.id)
                names.append(event.name)
                arguments.append("")
            else:
                assert isinstance(event, Arguments)
                assert event.index == len(names) - 1, "arguments of a call that is over"
                assert event.text
                arguments[-1] += event.text
    assert len(ids) == len(names)
    return content, list(zip(names, arguments, strict=True))


def splits(text: str, seed: int = 0) -> Iterable[list[str]]:
    """The text cut in every place once, into single characters, and at random."""
    yield [text]
    yield list(text)
    for place in range(1, len(text)):
        yield [text[:place], text[place:]]
    rng = random.Random(seed)
    for _ in range(5):
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
