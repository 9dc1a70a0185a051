"""Safe folders and atomic files."""

import errno
import os
import stat

import pytest

from max import CacheError
from max.cache import folder
from max.cache.folder import SUBFOLDERS, move_into_place, open_root, read_small, retrying, write_small


def test_a_new_folder_is_private_and_complete(tmp_path):
    root = tmp_path / "a" / "cache"
    assert open_root(root, create=True)
    for path in (root, *(root / name for name in SUBFOLDERS)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert (root / "VERSION").read_text() == "1\n"
    assert os.listdir(root / "tmp") == []
    assert open_root(root, create=True) and open_root(root, create=False)


def test_nothing_is_made_unasked(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_root(tmp_path / "cache", create=False)
    assert not open_root(tmp_path, create=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("which", [".", "blobs", "index"])
def test_a_folder_that_everybody_may_write_is_refused(tmp_path, which):
    open_root(tmp_path, create=True)
    (tmp_path / which).chmod(0o777)
    with pytest.raises(CacheError, match="everybody may write") as caught:
        open_root(tmp_path, create=True)
    assert "chmod 700" in caught.value.hint


def test_a_foreign_folder_is_refused_and_roots_is_not(tmp_path, monkeypatch):
    open_root(tmp_path, create=True)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        assert open_root(tmp_path, create=False)
        for path in (tmp_path, *(tmp_path / name for name in SUBFOLDERS)):
            os.chown(path, 12345, -1)
    with pytest.raises(CacheError, match="belongs to another user"):
        open_root(tmp_path, create=True)


def test_another_layout_is_refused(tmp_path):
    open_root(tmp_path, create=True)
    (tmp_path / "VERSION").write_text("2\n")
    with pytest.raises(CacheError, match="layout '2'"):
        open_root(tmp_path, create=True)


def test_a_file_in_the_folders_place_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        open_root(tmp_path / "file", create=True)
    with pytest.raises(NotADirectoryError):
        open_root(tmp_path / "file" / "below", create=True)


def test_small_files_are_replaced_whole(tmp_path):
    path, temporary = tmp_path / "a.json", tmp_path / "tmp"
    temporary.mkdir()
    write_small(path, b"one", temporary)
    write_small(path, b"two", temporary)
    assert read_small(path) == b"two"
    assert os.listdir(temporary) == []


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    path, temporary = tmp_path / "a.json", tmp_path / "tmp"
    temporary.mkdir()
    write_small(path, b"one", temporary)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_small(path, b"two", temporary)
    assert read_small(path) == b"one"
    assert os.listdir(temporary) == []


def test_content_is_durable_before_it_is_visible(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    (tmp_path / "new").write_text("x")
    move_into_place(tmp_path / "new", tmp_path / "ab" / "name")
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EBUSY])
def test_passing_errors_are_tried_again(monkeypatch, number):
    monkeypatch.setattr(folder, "_PAUSES_S", (0.0, 0.0, 0.0))
    left = [number] * 3

    def call(value):
        if left:
            raise OSError(left.pop(), "for a moment")
        return value

    assert retrying(call, 7) == 7
    left.extend([number] * 4)
    with pytest.raises(OSError, match="for a moment"):
        retrying(call, 7)


def test_other_errors_are_not_tried_again():
    calls = []

    def call():
        calls.append(1)
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        retrying(call)
    assert len(calls) == 1
