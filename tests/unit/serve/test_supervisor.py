"""Where the supervisor puts its sockets, and how long it waits between starts."""

from __future__ import annotations

import os
import stat

import pytest

from max import ConfigError
from max.serve.supervisor import _pause, _socket_folder


def test_a_base_names_the_folder_which_is_made_private(tmp_path):
    folder = _socket_folder(f"ipc://{tmp_path}/a/b")
    assert folder == tmp_path / "a/b"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert _socket_folder(f"ipc://{tmp_path}/a/b") == folder, "it may be there already"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("tcp://0.0.0.0:5555", "tcp"),
        ("ipc://relative", "relative"),
        ("ipc:///tmp/" + "x" * 100, "too long"),
        ("ipc:///proc/nothing", "nothing"),
    ],
)
def test_what_cannot_hold_sockets_is_refused(base, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _socket_folder(base)
    assert caught.value.hint


def test_a_folder_open_to_others_is_refused(tmp_path):
    os.chmod(tmp_path, 0o755)
    with pytest.raises(ConfigError, match="others could reach"):
        _socket_folder(f"ipc://{tmp_path}")


def test_the_first_restart_is_at_once_and_later_ones_wait_longer_up_to_a_limit():
    pauses = [_pause(quick_ends) for quick_ends in range(12)]
    assert pauses[:3] == [0.0, 0.0, 0.25]
    assert pauses == sorted(pauses)
    assert max(pauses) == 15.0
