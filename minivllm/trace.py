"""``minivllm trace summary FILE [REQUEST]``: what a step trace says, in plain words."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from minivllm.errors import TraceError
from minivllm.flags import Parser
from minivllm.tracing.lives import Life
from minivllm.tracing.reader import TraceReader
from minivllm.tracing.words import Overview, life_lines

_MOST_NAMED = 5


def main(argv: list[str]) -> int:
    """Print a summary. Returns the exit code."""
    parser = Parser("minivllm trace", "Explain a file that minivllm serve --trace FILE wrote.")
    parser.add_argument("action", choices=("summary",), help="the run as a whole, or one request's life")
    parser.add_argument("file", metavar="FILE", help="may still be being written")
    parser.add_argument(
        "request",
        metavar="REQUEST",
        nargs="?",
        help="the id of a request: of its answer (chatcmpl-...), or its X-Request-Id; any part of it that "
        "no other has will do (default: an overview, with the slowest requests)",
    )
    parsed = parser.parse(argv)
    reader, overview = TraceReader(parsed.file), Overview()
    cut: TraceError | None = None
    try:
        for record in reader:
            overview.follow(record)
    except TraceError as error:
        cut = error
        if reader.num_steps == 0:
            raise
    overview.lives.finish(overview.end)
    try:
        if parsed.request is None:
            lines = overview.lines(reader.header)
        else:
            lines = life_lines(find(overview.lives.all, parsed.request), overview.end)
    except TraceError as error:
        raise error if cut is None else TraceError(f"{error}; {cut}") from None
    print("\n".join(lines))
    if cut is not None:
        raise TraceError(f"{cut}; what is said above is of the steps until then")
    return 0


def find(lives: Sequence[Life], given: str) -> Life:
    """The request whose id this is, or begins with this, or has this in it, where there is but one.

    Raises:
        TraceError: there is none, or several.
    """
    matches: tuple[Callable[[str], bool], ...] = (
        lambda id: id == given,
        lambda id: id.startswith(given),
        lambda id: given in id,
    )
    for matches_id in matches:
        found = [life for life in lives if any(map(matches_id, life.arrival.ids))]
        if len(found) == 1:
            return found[0]
        if found:
            named = ", ".join(life.request_id for life in found[:_MOST_NAMED])
            rest = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
            raise TraceError(f"{given!r} could be {named}{rest}")
    ids = {id for life in lives for id in life.arrival.ids}
    near = difflib.get_close_matches(given, ids, n=3, cutoff=0.5)
    hint = f"; near ones: {', '.join(near)}" if near else ""
    raise TraceError(f"no request {given!r} among the {len(lives)} of this trace{hint}")
