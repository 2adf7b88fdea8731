"""Text of one answer as it is given out: end tokens, half characters, and stop strings."""

from collections.abc import Sequence

from isthmus.cloud.generation.model.tokenizer import TextStream


class AnswerText:
    """Turns tokens into text that may be given out at once.

    What could be the beginning of a stop string is held back; a stop string itself is never given out.

    >>> text = AnswerText(TextStream(lambda tokens: "".join(map(chr, tokens))), stops=["END"], end_ids=[0])
    >>> [text.add(ord(letter)) for letter in "aEbEND"]
    [('a', False), ('', False), ('Eb', False), ('', False), ('', False), ('', True)]
    """

    def __init__(self, stream: TextStream, stops: Sequence[str], end_ids: Sequence[int]) -> None:
        self._stream = stream
        self._stops = tuple(stops)
        self._end_ids = frozenset(end_ids)
        self._held = ""
        self.stopped = False
        """Whether the answer ended by itself: with an end token or a stop string."""

    def add(self, token: int) -> tuple[str, bool]:
        """Returns the text to give out now, and whether the answer ends with this token."""
        if token in self._end_ids:
            piece, _ = self._released(self._stream.rest(), last=True)
            self.stopped = True
            return piece, True
        return self._released(self._stream.add(token), last=False)

    def rest(self) -> str:
        """Returns what is still held back, at the end of an answer that was cut at its length."""
        return self._released(self._stream.rest(), last=True)[0]

    def _released(self, piece: str, *, last: bool) -> tuple[str, bool]:
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            given, self._held, self.stopped = self._held[: min(found)], "", True
            return given, True
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        given = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return given, False


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of ``text`` with which ``stop`` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
