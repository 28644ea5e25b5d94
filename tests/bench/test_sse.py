"""Server-sent events, written in all the ways that the standard allows, cut anywhere."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from minivllm_bench.sse import EventParser

lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)


@given(st.data())
def test_events_come_out_as_they_went_in(data: st.DataObject) -> None:
    newline = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    events = data.draw(st.lists(st.lists(lines, min_size=1, max_size=3), max_size=5))
    stream = ""
    for event in events:
        for other in data.draw(st.lists(st.sampled_from([": ping", ":", "id: 7", "event: x", "data2: y"]))):
            stream += other + newline
        for line in event:
            space = " " if line.startswith(" ") or data.draw(st.booleans()) else ""
            stream += f"data:{space}{line}" + newline
        stream += newline * data.draw(st.integers(1, 3))
    received = stream.encode()
    cuts = data.draw(st.sets(st.integers(0, len(received)), max_size=10).map(sorted))
    parser = EventParser()
    parsed = []
    for start, end in itertools.pairwise([0, *cuts, len(received)]):
        parsed += parser.feed(received[start:end])
    parsed += parser.finish()
    assert parsed == ["\n".join(event).encode() for event in events]


def test_an_event_is_out_with_its_last_byte() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\ndata: b\n\nda") == [b"a", b"b"]
    assert parser.feed(b"ta: c\r\n\r") == []
    assert parser.feed(b"\n") == [b"c"]
    assert parser.feed(b"data:d") == []
    assert parser.finish() == [b"d"]
