"""Remote tiers against real servers on loopback: an S3 server, nginx or Python's own for http, and a folder."""

from __future__ import annotations

import base64
import contextlib
import hmac
import io
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from max import CacheError, ConfigError
from max.cache import mef, signing
from max.cache.catalog import entries
from max.cache.config import CacheConfig
from max.cache.key import make_key
from max.cache.mef import MefWriter
from max.cache.remote import Remote
from max.cache.store import Store

KEY, OTHER = make_key({"model": {"layers": 2}}), make_key({"model": {"layers": 3}})


def artifact(name: str) -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add_json(mef.MANIFEST, "", {"name": name, "target": "cpu:native", "graphs": {}})
        writer.add(mef.NATIVE, "step", name.encode() * 9000, target="cpu:native", codec="none")
        writer.finish()
    return file.getvalue()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[None]:
    """Runs a server until the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, f"{command[0]} ended"
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server with an empty bucket; the environment says how to reach it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    credentials = {
        "AWS_ENDPOINT": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in credentials}
    os.environ |= credentials
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, port):
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
        yield "s3://bucket/max"
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


# Of every Azurite, and of no account of anybody's: its documentation names them.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture
def azure(tmp_path: Path, monkeypatch) -> Iterator[str]:
    """Microsoft's own emulator of its store, with an empty container; the environment says how to reach it."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("there is no azurite-blob (npm install azurite)")
    port = free_port()
    address = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURE_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", address)
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    place = ["--location", str(tmp_path / "azurite"), "--blobPort", str(port), "--silent", "--skipApiVersionCheck"]
    with serving([program, *place], port):
        make_container(address, "box")
        yield "az://box/max"


def make_container(address: str, name: str) -> None:
    """Asks for a container; signed as "Authorize with Shared Key" says, of a request with no body."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = [f"{header}:{value}" for header, value in headers.items()]
    statement = "\n".join(["PUT", *[""] * 11, *lines, f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{name}", "restype:container"])
    digest = hmac.new(base64.b64decode(AZURE_KEY), statement.encode(), "sha256").digest()
    headers |= {
        "Authorization": f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}",
        "Content-Length": "0",
    }
    urllib.request.urlopen(
        urllib.request.Request(f"{address}/{name}?restype=container", method="PUT", headers=headers)
    ).close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> Store:
    """A store of two artifacts; its owner's key is trusted by default."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    line = signing.new_key(tmp_path / "config" / "max" / "signing-key")
    trusted = tmp_path / "config" / "max" / "trusted-keys"
    trusted.write_text(line)
    trusted.chmod(0o600)
    store = Store.open(CacheConfig(cache_dir=tmp_path / "cache"))
    assert store.publish(KEY, artifact("two")) and store.publish(OTHER, artifact("three"))
    return store


def sign(store: Store, tmp_path: Path) -> None:
    private = signing.read_key(tmp_path / "config" / "max" / "signing-key")
    for entry in entries(store):
        store.add_signatures(signing.sign(private, entry.record.key, entry.record.mef))


def push(store: Store, url: str) -> list[bool]:
    remote = Remote(url, store.trust)
    return [remote.push(store, entry) for entry in entries(store)]


def other_host(tmp_path: Path, url: str, **settings) -> Store:
    return Store.open(CacheConfig(cache_dir=tmp_path / "other", cache_remote=url, **settings))


def check_round_trip(store: Store, tmp_path: Path, url: str) -> None:
    assert push(store, url) == [True, True] and push(store, url) == [False, False]
    other = other_host(tmp_path, url)
    found = other.lookup(KEY)
    assert found is not None and found.content() == artifact("two")
    assert other.counters.hits == {"remote": 1} and other.counters.bytes_fetched == found.size
    assert other.lookup(KEY) and other.counters.hits == {"remote": 1, "exact": 1}
    assert other.lookup(make_key({"model": "unknown"})) is None and other.counters.misses == {"absent": 1}
    assert sorted(Remote(url, store.trust).keys()) == sorted([KEY.digest, OTHER.digest])
    assert Remote(url, store.trust).pull(other, OTHER.digest).key == OTHER.digest
    assert Store.open(CacheConfig(cache_dir=tmp_path / "other")).lookup(OTHER)


def test_s3(store: Store, tmp_path: Path, s3: str) -> None:
    check_round_trip(store, tmp_path, f"{s3}/round-trip")


def test_azure(store: Store, tmp_path: Path, azure: str) -> None:
    check_round_trip(store, tmp_path, azure)


def test_a_folder(store: Store, tmp_path: Path) -> None:
    (tmp_path / "remote folder").mkdir()
    check_round_trip(store, tmp_path, f"file://{tmp_path}/remote%20folder")


def test_a_cache_that_is_only_read_takes_artifacts_into_memory(store: Store, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    push(store, f"file://{tmp_path}/remote")
    other = other_host(tmp_path, f"file://{tmp_path}/remote", cache_policy="readonly")
    found = other.lookup(KEY)
    assert found is not None and found.content() == artifact("two") and other.artifact_path(found) is None
    assert not (tmp_path / "other").exists()


def damage(remote: Path, what: str) -> None:
    record = next(remote.glob(f"v1/index/{KEY.digest}.json"))
    blobs = {path.name: path for path in (remote / "v1" / "blobs").iterdir()}
    blob = next(path for name, path in blobs.items() if name in record.read_text())
    match what:
        case "code":
            blob.write_bytes(blob.read_bytes()[:-5000] + b"x" + blob.read_bytes()[-4999:])
        case "short":
            blob.write_bytes(blob.read_bytes()[:-1])
        case "long":
            blob.write_bytes(blob.read_bytes() + b"x")
        case "another artifact":
            shutil.copy(next(path for path in blobs.values() if path != blob), blob)
        case "no artifact":
            blob.unlink()
        case "record":
            record.write_bytes(b"{}")
        case "another record":
            shutil.copy(next(path for path in record.parent.iterdir() if path != record), record)


@pytest.mark.parametrize(
    "what", ["code", "short", "long", "another artifact", "no artifact", "record", "another record"]
)
def test_what_is_damaged_there_is_a_warning_and_a_miss(store: Store, tmp_path: Path, caplog, what: str) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()
    push(store, f"file://{remote}")
    damage(remote, what)
    other = other_host(tmp_path, f"file://{remote}")
    assert other.lookup(KEY) is None
    kept = [path for path in other.root.rglob("*") if path.is_file() and path.name != "VERSION"]
    assert kept == []
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == (0 if what == "no artifact" and not warnings else 1)
    assert other.publish(KEY, artifact("two")) and other.lookup(KEY), "compiled here instead"


@pytest.mark.parametrize("open_to_all", [True, False])
def test_a_folder_that_others_may_write_is_taken_from_only_with_signatures(
    store: Store, tmp_path: Path, open_to_all: bool
) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()
    push(store, f"file://{remote}")
    remote.chmod(0o777 if open_to_all else 0o755)
    assert (other_host(tmp_path, f"file://{remote}").lookup(KEY) is None) == open_to_all
    sign(store, tmp_path)
    assert push(store, f"file://{remote}") == [True, True]
    found = other_host(tmp_path, f"file://{remote}", require_signed=True).lookup(OTHER)
    assert found is not None


def nginx(folder: Path, port: int) -> list[str] | None:
    """A command that serves a folder with nginx; None where there is none."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        return None
    work = folder.parent / "nginx"
    work.mkdir()
    places = "".join(
        f"{name}_temp_path {work}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (work / "nginx.conf").write_text(
        f"daemon off; {user} pid {work}/pid; error_log {work}/error.log; events {{}}"
        f"http {{ access_log off; {places} server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
    )
    return [program, "-p", str(work), "-e", f"{work}/error.log", "-c", f"{work}/nginx.conf"]


@pytest.mark.parametrize("server", ["nginx", "python"])
def test_http(store: Store, tmp_path: Path, server: str, caplog) -> None:
    folder, port = tmp_path / "served", free_port()
    folder.mkdir()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    if server == "nginx":
        found = nginx(folder, port)
        if found is None:
            pytest.skip("there is no nginx")
        command = found
    push(store, f"file://{folder}")
    url = f"http://127.0.0.1:{port}"
    with serving(command, port):
        assert other_host(tmp_path, url).lookup(KEY) is None
        assert "http is open to changes on the way" in caplog.text
        sign(store, tmp_path)
        push(store, f"file://{folder}")
        found_there = other_host(tmp_path, url).lookup(KEY)
        assert found_there is not None and found_there.content() == artifact("two")
        assert Remote(url, store.trust).pull(other_host(tmp_path, url), OTHER.digest).key == OTHER.digest
        with pytest.raises(ConfigError, match="cannot be listed"):
            list(Remote(url, store.trust).keys())
        assert store.publish(make_key({"model": "new"}), artifact("new"))
        with pytest.raises(CacheError):
            Remote(url, store.trust).push(store, entries(store)[0])
    after = other_host(tmp_path / "later", url)
    assert after.lookup(KEY) is None and "going on without the remote" in caplog.text


@pytest.mark.parametrize("url", ["ftp://host/x", "bucket", "s3://", "://x", "file:relative"])
def test_an_address_that_means_nothing_is_a_mistake_in_the_settings(url: str) -> None:
    with pytest.raises(ValueError, match="must begin with one of s3://"):
        CacheConfig(cache_remote=url)


def test_the_commands(call, store: Store, tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/remote"
    (tmp_path / "remote").mkdir()
    here, there = ("--cache-dir", str(store.root)), ("--cache-dir", str(tmp_path / "other"))
    assert call("cache", "push", *here).code == 2
    assert call("cache", "push", *here, "--cache-remote", remote).out.count("pushed ") == 2
    assert call("cache", "push", KEY.digest[:8], *here, "--cache-remote", remote).out.startswith("there already")
    assert "2 pulled" in call("cache", "pull", *there, "--cache-remote", remote).out
    bundle = str(tmp_path / "b.bundle")
    assert "1 exported" in call("cache", "export", bundle, KEY.digest[:8], *here).out
    assert "1 imported" in call("cache", "import", bundle, "--cache-dir", str(tmp_path / "third")).out
    assert call("cache", "import", bundle, "--cache-dir", "/proc/self/nowhere").code == 2
    assert call("cache", "verify", "--cache-dir", str(tmp_path / "third")).out == "2 checked, 0 damaged\n"
