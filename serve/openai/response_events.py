"""The events of a streamed response, numbered, in the order that clients of the OpenAI API expect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..answer import Delta, WholeAnswer
from ..event_stream import event
from .logprobs import output_logprobs

if TYPE_CHECKING:
    from .responses import ResponseReply


class ResponseEvents:
    """Writes the events of one response, which has one message with one part of text."""

    def __init__(self, reply: ResponseReply) -> None:
        self._reply, self._number = reply, 0
        self._place = {"item_id": reply.message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event(content, kind)

    def opening(self) -> bytes:
        """The events before the first text."""
        reply, empty = self._reply, WholeAnswer()
        item = {**reply.item(empty), "status": "in_progress", "content": []}
        return b"".join(
            (
                self._event("response.created", response=reply.begun()),
                self._event("response.in_progress", response=reply.begun()),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **self._place, part=reply.part(empty)),
            )
        )

    def delta(self, delta: Delta) -> bytes:
        """New text; nothing for a delta that only ends the answer."""
        if not delta.text and not delta.tokens:
            return b""
        logprobs = output_logprobs(delta.tokens, self._reply.tokenizer)
        return self._event("response.output_text.delta", **self._place, delta=delta.text, logprobs=logprobs)

    def closing(self, answer: WholeAnswer, response: dict[str, Any]) -> bytes:
        """The events behind the last text."""
        reply = self._reply
        part, item = reply.part(answer), reply.item(answer)
        done = {"text": answer.text, "logprobs": part["logprobs"]}
        return b"".join(
            (
                self._event("response.output_text.done", **self._place, **done),
                self._event("response.content_part.done", **self._place, part=part),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{response['status']}", response=response),
            )
        )
