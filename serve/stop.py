"""Cuts a text that arrives in pieces at its leftmost stop string, and holds back no more than it must."""

from __future__ import annotations

from collections.abc import Sequence

from .. import RequestError


class StopMatcher:
    """Passes text on up to the first stop string. The result does not depend on how the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises: RequestError for an empty stop string."""
        if any(not stop for stop in stops):
            raise RequestError("a stop string is empty", "Leave it out: it would end every text at once.")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns the text that may be shown now, and whether a stop string was found.

        What is held back is a suffix that may become a stop string. The stop string itself is never shown, and after
        it nothing is.
        """
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        found = self._leftmost(text)
        # A longer stop string that has only begun may start before one that is complete: then that one decides.
        unfinished = self._unfinished(text)
        if found < unfinished:
            self._held, self._stopped = "", True
            return text[:found], True
        self._held = text[unfinished:]
        return text[:unfinished], False

    def flush(self) -> tuple[str, bool]:
        """Ends the text: returns what was held back, cut at a stop string in it, and whether there was one."""
        if self._stopped:
            return "", True
        found = self._leftmost(self._held)
        self._stopped = found < len(self._held)
        text, self._held = self._held[:found], ""
        return text, self._stopped

    def _leftmost(self, text: str) -> int:
        """Where the first stop string begins; the length of `text` when there is none."""
        return min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=len(text))

    def _unfinished(self, text: str) -> int:
        """Where the longest suffix begins that is a proper prefix of a stop string; the length of `text` when none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            suffix = text[start:]
            if any(len(suffix) < len(stop) and stop.startswith(suffix) for stop in self._stops):
                return start
        return len(text)
