"""From lengths to text: what is really sent for a session of so many tokens.

The words below are one token each, with the space before them, in the vocabularies of practically all
models, so that a text of N words has N tokens (a chat template and a start token come on top).
"""

from __future__ import annotations

import random

from minivllm_bench.workloads import Session, Turn

_TEXT = """
able about again always and are arm around bad base been begin being below bit boat bread brown build built
but call came camp can car care case catch center chair check choose city clean clock cloud color column
come cook cool copy corn cross dark day deal did doctor does dog draw earth east edge egg either else engine
even ever every face feel felt figure final find fine first fish five floor flow flower fly follow food foot
for four friend from full game gas gold got grand grass gray great ground grow hard has head heat heavy held
help high hit horse human ice joy kind king land large lead learn leave led left length less letter level
like line list listen live local long look lot major many market mass match matter method middle mind minute
mix modern money month more mother much nation nature near never new next night nine off old once one order
other pair part pass person plain play power press race ran range rate reach real reason repeat result ride
right rock roll root row run safe salt school sea seat sell sent seven sharp she sheet ship short should side
simple since six size skin sky snow soon sound south speech spot square stand stop store stream street supply
system tail tell term thank the their them then these they thin think those though three tie tone total touch
track train tree true type under unit until value very voice wait water wave wear west what wheel which while
white whole why wide will wind with would write wrong yes you young your
"""
WORDS = _TEXT.split()


class TextSource:
    """Random words, the same for the same seed.

    Texts of different sessions differ from their first word on (with more sessions than words, within the
    first few words): nothing of them can come out of a prefix cache, except what a workload shares.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._words = random.Random(f"{seed}/words").sample(WORDS, len(WORDS))

    def shared_prefix(self, num_words: int) -> str:
        """The same for all sessions, and shorter ones are the beginning of longer ones."""
        return " ".join(random.Random(f"{self._seed}/prefix").choices(self._words, k=num_words))

    def turn(self, session: int, turn: int, num_words: int) -> str:
        """What a session's turn adds. The first one starts with the session's number, spelled in words."""
        words = self._number(session) if turn == 0 else []
        rng = random.Random(f"{self._seed}/{session}/{turn}")
        words += rng.choices(self._words, k=max(0, num_words - len(words)))
        return " ".join(words[:num_words])

    def _number(self, number: int) -> list[str]:
        digits = []
        while True:
            number, digit = divmod(number, len(self._words))
            digits.append(self._words[digit])
            if number == 0:
                return digits


class Conversation:
    """A session's text as it grows: each turn sends all that was said before it, answers included."""

    def __init__(self, source: TextSource, number: int, session: Session) -> None:
        self._source = source
        self._number = number
        self._system = source.shared_prefix(session.shared_prefix_tokens)
        self._said: list[str] = []
        self.prompt_tokens = session.shared_prefix_tokens
        """Of the prompt as the workload has it; what the server counts may be a few more."""

    def ask(self, turn: Turn) -> None:
        """Add the next turn's question."""
        place = len(self._said) // 2
        text = turn.text
        self._said.append(
            text if text is not None else self._source.turn(self._number, place, turn.prompt_tokens)
        )
        self.prompt_tokens += turn.prompt_tokens

    def answer(self, text: str, num_tokens: int) -> None:
        """Add the server's answer to it."""
        self._said.append(text)
        self.prompt_tokens += num_tokens

    @property
    def prompt(self) -> str:
        """All of it as one text, for ``/v1/completions``."""
        text = self._system
        for place, part in enumerate(self._said):
            is_question = place % 2 == 0
            text += f" {part}" if is_question and text else part
        return text

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it as messages, for ``/v1/chat/completions``."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        roles = ("user", "assistant")
        return system + [{"role": roles[i % 2], "content": part} for i, part in enumerate(self._said)]
