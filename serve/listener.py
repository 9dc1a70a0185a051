"""The sockets that a server listens on, open before anything is loaded, and how many connections it may have."""

from __future__ import annotations

import errno
import resource
import socket

from .. import ConfigError

BACKLOG = 2048


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket: connections queue until a server takes them. Raises ConfigError naming --host or `flag`."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        is_host = isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL
        port_hint = f"Choose another with {flag}; 0 takes a free port."
        hint = "Name an address of this machine with --host." if is_host else port_hint
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}", hint) from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit() -> None:
    """Allows as many open files as this user may have: every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
