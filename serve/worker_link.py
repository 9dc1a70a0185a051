"""The worker's end of the line to its clients: a ZMQ socket that knows each of them by the name ZMQ gave it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import zmq

from .messages import FromWorker, ToWorker

_LINGER_MS = 500


class WorkerLink:
    """Takes messages with the client they came from, and sends each client what was said to it since the last flush."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: of ZMQ, such as ipc:///a/private/folder/engine, which clients connect to"""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)  # or messages to a client that has gone would vanish unseen
        self._socket.bind(endpoint)
        self._decoder = msgspec.msgpack.Decoder(list[ToWorker])
        self._encoder = msgspec.msgpack.Encoder()
        self._outbox: dict[bytes, list[FromWorker]] = {}

    def receive(self, timeout_ms: int | None) -> Iterator[tuple[bytes, ToWorker]]:
        """What has come; waits for something for so long, None for as long as it takes."""
        if not self._socket.poll(timeout_ms):
            return
        while True:
            try:
                client, frame = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for message in self._decoder.decode(frame):
                yield client, message

    def say(self, client: bytes, message: FromWorker) -> None:
        """Puts a message into the client's next frame."""
        self._outbox.setdefault(client, []).append(message)

    def flush(self) -> list[bytes]:
        """Sends what was said; returns the clients that turned out to have gone."""
        gone = []
        for client, messages in self._outbox.items():
            try:
                self._socket.send_multipart([client, self._encoder.encode(messages)])
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                gone.append(client)
        self._outbox.clear()
        return gone

    def close(self) -> None:
        """Sends what is on its way, and forgets the rest after half a second."""
        self._socket.close(_LINGER_MS)
        self._context.term()
