"""Stop strings: never given out, not even in part, however they are cut into tokens."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.generation.model.tokenizer import TextStream
from isthmus.cloud.generation.serve.text import AnswerText


def letters(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@settings(max_examples=80)
@given(
    said=st.text(alphabet="abé", max_size=12),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
)
def test_what_is_given_out_ends_before_the_first_stop_string(said: str, stops: list[str]) -> None:
    text = AnswerText(TextStream(letters), stops, end_ids=[0])
    given, ended = "", False
    for token in said.encode():
        piece, ended = text.add(token)
        given += piece
        assert said.startswith(given)
        if ended:
            break
    if not ended:
        given += text.rest()
    ends = [said.find(stop) for stop in stops if stop in said]
    # The stop string that is complete first counts; of those, the one that begins first.
    complete = [said.find(stop) + len(stop) for stop in stops if stop in said]
    if complete:
        seen = said[: min(complete)]
        assert given == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    else:
        assert given == said and not ends


def test_an_end_token_gives_out_what_was_held_back() -> None:
    text = AnswerText(TextStream(letters), ["stop"], end_ids=[0])
    assert [text.add(ord(letter)) for letter in "sto"] == [("", False)] * 3
    assert text.add(0) == ("sto", True)
    assert text.stopped
