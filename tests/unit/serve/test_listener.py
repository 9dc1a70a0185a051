"""Sockets listen before anything is loaded, and what is wrong with an address is told with the flag to change."""

from __future__ import annotations

import resource
import socket

import pytest

from max import ConfigError
from max.serve.listener import bind, raise_file_limit, url_of


def test_connections_queue_before_anything_serves_them() -> None:
    with bind("127.0.0.1", 0, "--port") as listener:
        socket.create_connection(listener.getsockname()).close()
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_browser_on_this_machine_is_sent_to_it() -> None:
    with bind("0.0.0.0", 0, "--port") as listener:
        assert url_of(listener) == f"http://localhost:{listener.getsockname()[1]}"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "a" * 300, "203.0.113.7"])
def test_addresses_that_are_not_ours(host: str) -> None:
    with pytest.raises(ConfigError) as raised:
        bind(host, 0, "--metrics-port")
    assert host in raised.value.message and "--host" in raised.value.hint


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0, "--port") as listener, pytest.raises(ConfigError, match="in use") as raised:
        bind("127.0.0.1", listener.getsockname()[1], "--metrics-port")
    assert "--metrics-port" in raised.value.hint


def test_as_many_files_as_this_user_may_have() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
