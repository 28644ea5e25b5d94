"""Server-sent events out of a stream of bytes, as the HTML standard (section 9.2.6) has them."""

from __future__ import annotations


class EventParser:
    """Takes bytes as they come and gives back the data of each event that they complete.

    Lines end with LF, CRLF or CR; an event's data lines are joined by LF; comments (keep-alives) and fields
    other than data are left out.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that end in ``received``."""
        text = self._rest + received
        if b"\r" in text:
            # The LF of a CRLF may be still to come.
            held = b"\r" if text.endswith(b"\r") else b""
            text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        else:
            held = b""
        *events, rest = text.split(b"\n\n")
        self._rest = rest + held
        return [data for event in events if (data := _data(event)) is not None]

    def finish(self) -> list[bytes]:
        """At the end of the stream: some servers leave out the blank line after their last event."""
        return self.feed(b"\n\n")


def _data(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:  # practically all are like this
        return event[6:]
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:") or line == b"data"]
    return b"\n".join(line.removeprefix(b" ") for line in lines) if lines else None
