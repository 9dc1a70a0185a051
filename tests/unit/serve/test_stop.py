"""However a text is cut into pieces, it ends at its leftmost stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from max import RequestError
from max.serve.stop import StopMatcher

PIECES = st.lists(st.text("abc", max_size=4), max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece)[0] for piece in pieces)
    rest, stopped = matcher.flush()
    return shown + rest, stopped


@given(stops=STOPS, pieces=PIECES)
def test_every_chunking_gives_the_text_before_the_leftmost_stop(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    places = [text.find(stop) for stop in stops if stop in text]
    assert run(stops, pieces) == (text[: min(places)] if places else text, bool(places))


@given(stops=STOPS, pieces=PIECES)
def test_only_a_proper_prefix_of_a_stop_is_held_back(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = given_text = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        if stopped:
            break
        shown, given_text = shown + text, given_text + piece
        held = given_text[len(shown) :]
        assert given_text.startswith(shown)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_stop_is_reported_as_soon_as_it_is_complete() -> None:
    matcher = StopMatcher(["<|end|>"])
    assert [matcher.push(piece) for piece in ("Hi", " <|", "en", "d|> more", "!")] == [
        ("Hi", False),
        (" ", False),
        ("", False),
        ("", True),
        ("", True),
    ]


def test_text_that_only_looked_like_a_stop_is_shown() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece)[0] for piece in ("a\n", "\nUs", "a", "ge")] == ["a", "", "\n\nUsa", "ge"]


def test_an_earlier_unfinished_stop_decides_over_a_later_complete_one() -> None:
    assert run(["abc", "b"], ["ab", "c"]) == ("", True)
    assert run(["abc", "b"], ["ab", "d"]) == ("a", True)
    assert run(["abc", "b"], ["ab"]) == ("a", True)


def test_without_stops_nothing_is_held() -> None:
    matcher = StopMatcher([])
    assert matcher.push("text") == ("text", False)
    assert matcher.flush() == ("", False)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(RequestError, match="empty") as caught:
        StopMatcher(["a", ""])
    assert caught.value.hint
