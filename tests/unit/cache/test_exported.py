"""Exported folders and bundles: what goes in comes out on another host, and nothing that was changed on the way."""

import io
import json
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from max import ConfigError
from max.cache import mef, signing
from max.cache.bundle import read_bundle, write_bundle
from max.cache.catalog import entries
from max.cache.config import CacheConfig
from max.cache.exported import export_to, find_precompiled, read_manifest
from max.cache.key import make_key
from max.cache.mef import Mef, MefWriter
from max.cache.store import Store
from max.cache.trust import Trust

KEY = make_key({"model": {"layers": 2}, "target": {"platform": "cpu"}})
OTHER = make_key({"model": {"layers": 3}, "target": {"platform": "cpu"}})


def artifact(name: str) -> bytes:
    file = io.BytesIO()
    with MefWriter(file) as writer:
        argument = {"name": "x", "role": "input", "dtype": "float32", "shape": [2]}
        graph = {"arguments": [argument, {**argument, "role": "weight"}], "outputs": [{"name": "y"}]}
        writer.add_json(mef.MANIFEST, "", {"name": name, "target": "cpu:native", "graphs": {"step": graph}})
        writer.add(mef.NATIVE, "step", name.encode() * 5000, target="cpu:native", codec="none")
        writer.finish()
    return file.getvalue()


@pytest.fixture
def trust(tmp_path):
    return Trust(tmp_path / "trusted-keys")


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    for key, name in ((KEY, "two"), (OTHER, "three layers/..")):
        export_to(folder, key, Mef.from_bytes(artifact(name)), None)
    return folder


def test_an_exported_artifact_is_found_by_its_key(exported, trust):
    found = find_precompiled([exported], KEY, trust)
    assert found.mef.content() == artifact("two") and found.path.parent == exported
    manifest = json.loads((exported / "manifest.json").read_text())
    row = next(each for each in manifest["artifacts"] if each["key"] == KEY.digest)
    assert row["graphs"]["step"]["inputs"] == [{"name": "x", "role": "input", "dtype": "float32", "shape": [2]}]
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        ["manifest.json", f"two-{KEY.digest[:12]}.mef", f"three_layers___-{OTHER.digest[:12]}.mef"]
    )


def test_exports_at_once_are_all_in_the_manifest(tmp_path, monkeypatch):
    def slowly(folder):
        found = read_manifest(folder)
        time.sleep(0.02)
        return found

    monkeypatch.setattr("max.cache.exported.read_manifest", slowly)
    keys = [make_key({"model": {"layers": number}}) for number in range(6)]
    content = Mef.from_bytes(artifact("one"))
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(lambda key: export_to(tmp_path, key, content, None), keys))
    assert {row.key for row in read_manifest(tmp_path).artifacts} == {key.digest for key in keys}


def test_a_second_export_replaces_the_first(exported):
    export_to(exported, KEY, Mef.from_bytes(artifact("two")), None)
    assert len(read_manifest(exported).artifacts) == 2


def test_several_folders_and_other_artifacts_that_serve(exported, trust, tmp_path):
    export_to(tmp_path / "more", make_key({"model": 1}), Mef.from_bytes(artifact("more")), None)
    folders = [exported, tmp_path / "more"]
    assert find_precompiled(folders, make_key({"model": 1}), trust).path.parent == tmp_path / "more"
    wanted = make_key({"model": 2})
    assert find_precompiled(folders, wanted, trust, lambda f: f["model"] == 1).key == make_key({"model": 1})


def test_a_miss_names_what_differs(exported, trust):
    wanted = make_key({"model": {"layers": 2}, "target": {"platform": "cuda"}})
    with pytest.raises(ConfigError, match=r"the nearest one differs in target.platform: cuda wanted, cpu stored$"):
        find_precompiled([exported], wanted, trust)


def flip(folder, offset: int) -> None:
    path = next(folder.glob("two-*.mef"))
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rename(folder) -> None:
    next(folder.glob("three*.mef")).rename(next(folder.glob("two-*.mef")))


DAMAGES = {
    "header": lambda folder: flip(folder, 20),
    "code": lambda folder: flip(folder, 70000),
    "table": lambda folder: flip(folder, -10),
    "another artifact": rename,
    "no artifact": lambda folder: next(folder.glob("two-*.mef")).unlink(),
    "manifest": lambda folder: (folder / "manifest.json").write_text("{}}"),
    "a path in the manifest": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"two-', '"../two-')
    ),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "open to everybody": lambda folder: folder.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_refused_and_nothing_else_is_taken(exported, trust, damage):
    damage(exported)
    with pytest.raises(ConfigError):
        find_precompiled([exported], KEY, trust)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of two artifacts, the first of which is signed."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    store = Store.open(CacheConfig(cache_dir=tmp_path / "cache"))
    made = store.publish(KEY, artifact("two"))
    assert made and store.publish(OTHER, artifact("three"))
    signing.new_key(tmp_path / "key")
    store.add_signatures(signing.sign(signing.read_key(tmp_path / "key"), KEY.digest, made.id))
    return store


@pytest.fixture
def other_host(tmp_path):
    return Store.open(CacheConfig(cache_dir=tmp_path / "other"))


def test_a_bundle_carries_artifacts_and_signatures(store, other_host, tmp_path):
    bundle = tmp_path / "a.bundle"
    write_bundle(bundle, store, entries(store))
    rows = list(read_bundle(bundle, other_host, other_host.trust))
    assert {row.key for row in rows} == {KEY.digest, OTHER.digest}
    for key, name in ((KEY, "two"), (OTHER, "three")):
        found = other_host.lookup(key)
        assert found is not None and found.content() == artifact(name)
    assert other_host.signatures(KEY.digest) == store.signatures(KEY.digest)
    assert not any((other_host.root / "tmp").iterdir())


def test_an_import_may_ask_for_signatures(store, tmp_path):
    bundle = tmp_path / "a.bundle"
    write_bundle(bundle, store, entries(store))
    keys = tmp_path / "trusted"
    keys.write_text(signing.public_line(signing.read_key(tmp_path / "key")))
    keys.chmod(0o600)
    other = Store.open(CacheConfig(cache_dir=tmp_path / "other", require_signed=True, trusted_keys=keys))
    with pytest.raises(ConfigError, match="bears no signature"):
        list(read_bundle(bundle, other, other.trust))
    write_bundle(bundle, store, [entry for entry in entries(store) if entry.record.key == KEY.digest])
    assert [row.key for row in read_bundle(bundle, other, other.trust)] == [KEY.digest]
    assert Store.open(CacheConfig(cache_dir=tmp_path / "other", require_signed=True, trusted_keys=keys)).lookup(KEY)


def test_no_damaged_bundle_adds_anything_wrong(store, other_host, tmp_path):
    bundle = tmp_path / "a.bundle"
    write_bundle(bundle, store, entries(store))
    good = bundle.read_bytes()
    places = [*range(0, len(good), 2111), *range(0, 3000, 97)]
    wrong = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 0x41
        bundle.write_bytes(damaged)
        try:
            list(read_bundle(bundle, other_host, other_host.trust))
        except ConfigError as error:
            assert error.hint
            wrong += 1
    assert wrong > len(places) * 0.8, "what is left are the modes, times and padding of the archive"
    for length in range(0, len(good) - tarfile.RECORDSIZE, 9973):  # which ends in zeros
        bundle.write_bytes(good[:length])
        with pytest.raises(ConfigError):
            list(read_bundle(bundle, other_host, other_host.trust))
    for key, name in ((KEY, "two"), (OTHER, "three")):
        found = Store.open(CacheConfig(cache_dir=other_host.root)).lookup(key)
        assert found is None or found.content() == artifact(name)
    assert not any((other_host.root / "quarantine").iterdir())


@pytest.mark.parametrize("name", ["../../escape", "/tmp/escape", "other"])
def test_names_in_a_bundle_are_no_paths(store, other_host, tmp_path, name):
    bundle = tmp_path / "a.bundle"
    write_bundle(bundle, store, entries(store))
    with tarfile.open(bundle, "a") as archive:
        member = tarfile.TarInfo(name)
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ConfigError, match="does not name"):
        list(read_bundle(bundle, other_host, other_host.trust))


@pytest.mark.parametrize("content", [b"", b"x" * 2000, None])
def test_what_is_no_bundle(other_host, tmp_path, content):
    path = tmp_path / "a.bundle"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError):
        list(read_bundle(path, other_host, other_host.trust))
