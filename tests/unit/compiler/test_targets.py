"""Targets are parsed with near matches and described by data with sources; what runs where is compared."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest

from max import CacheError, ConfigError
from max.compiler import Target, compat
from max.compiler.targets import attached, cpu_features, spec_files, target_names
from max.compiler.targets.gpu_config import gpu_config
from max.compiler.targets.listing import target_rows
from max.compiler.targets.toolchain import PLUGINS
from max.compiler.targets.xla_options import Products, xla_options
from max.compiler.weights import Element

LISTED = (
    *(f"cuda:sm_{arch}" for arch in (80, 86, 89, 90, 100, 120)),
    *(f"hip:{arch}" for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
    *("tpu:v5e", "tpu:v5e:2x2", "tpu:v6e", "tpu:v6e:2x2"),
    *(
        f"cpu:{arch}"
        for arch in ("native", "x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "znver4", "sapphirerapids")
    ),
)


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_target_parses_to_itself_and_has_a_spec_that_json_holds(name: str) -> None:
    target = Target.parse(name)
    assert target.name == name and Target.parse(target.name) == target
    assert json.loads(json.dumps(target.spec())) == target.spec()
    others = [Target.parse(other).spec() for other in LISTED if other != name]
    assert target.spec() not in others, "equal specs would give equal keys"


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("cuda", "cuda:sm_80"),
        ("hip", "hip:gfx942"),
        ("tpu", "tpu:v5e"),
        ("cpu", "cpu:native"),
        ("tpu:v6e:1x1", "tpu:v6e"),
    ],
)
def test_defaults(short: str, full: str) -> None:
    assert Target.parse(short) == Target.parse(full)
    assert Target.parse(short).name == full


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("cpu:natve", "Did you mean cpu:native"),
        ("cudda", "Did you mean cuda"),
        ("cuda:sm90", "cuda:sm_90"),
        ("CUDA:SM_90", "cuda:sm_90"),
        ("sm_90", "Did you mean cuda:sm_90?"),
        ("gfx942", "Did you mean hip:gfx942?"),
        ("cuda:gfx942", "hip:gfx942"),
        ("cuda:sm_90:2x2", "cuda:sm_90"),
        ("metal:apple-m1", "There are: cuda, cuda:sm_80"),
        ("", "There are: cuda, cuda:sm_80"),
        (":", "There are: cuda, cuda:sm_80"),
    ],
)
def test_unknown_targets_name_near_ones_and_all(text: str, guess: str) -> None:
    with pytest.raises(ConfigError, match="there is no target") as caught:
        Target.parse(text)
    assert guess in caught.value.hint
    assert all(name in caught.value.hint for name in LISTED)


def test_a_mesh_is_a_target_of_its_own() -> None:
    mesh = Target.parse("cuda:sm_90:1x1x2")
    assert mesh == Target.parse("cuda:sm_90").over(2) and Target.parse(mesh.name) == mesh
    assert (mesh.devices, mesh.figures) == (2, Target.parse("cuda:sm_90").figures)
    assert mesh.spec()["topology"] == "1x1x2" and mesh.spec() != Target.parse("cuda:sm_90:1x1x4").spec()
    assert Target.parse("cuda:sm_90:1x1x1") == Target.parse("cuda:sm_90")
    assert Target.parse("tpu:v5e:2x2").devices == Target.parse("cpu").devices == 1
    for text in ("cuda:sm_90:1x2x2", "cuda:sm_90:1x1x0", "cuda:1x1x2", "hip:gfx942:1x1x2"):
        with pytest.raises(ConfigError, match="there is no target"):
            Target.parse(text)
    with pytest.raises(ConfigError, match="split over 2 devices of hip:gfx942: only NVIDIA's GPUs"):
        Target.parse("hip").over(2)
    with pytest.raises(ConfigError, match="a mesh of 65 devices"):
        Target.parse("cuda:sm_90:1x1x65")


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", spec_files.PLATFORMS)
def test_every_figure_has_a_source_that_is_described(platform: str) -> None:
    data = spec_files.read(platform)
    sources = data["sources"]
    assert all(len(text) > 20 for text in sources.values())
    used = set()
    for table in (
        data.get("common", {}),
        data.get("versions", {}),
        data.get("flags", {}),
        data.get("least_memory", {}),
        *data["arch"].values(),
    ):
        for name, figure in table.items():
            assert isinstance(figure, list) and len(figure) == 2 and figure[1] in sources, (platform, name)
            used.add(figure[1])
    assert used == set(sources), "a source that nothing uses"


@pytest.mark.parametrize("platform", ["cuda", "hip", "tpu"])
def test_figures_without_a_document_are_told(platform: str) -> None:
    for arch, row in spec_files.read(platform)["arch"].items():
        marked = [name for name, (_, source) in row.items() if source == "unverified"]
        assert spec_files.unverified(platform, arch) == marked
        assert len(marked) <= 1, "most of what is known of a product is in documents"


def test_the_unverified_figure_of_the_l40s_is_listed() -> None:
    rows = {row.target: row for row in target_rows()}
    assert rows["cuda:sm_89"].to_json()["unverified"] == ["l2_cache_size"]
    assert rows["cuda:sm_90"].unverified == rows["cpu:native"].unverified == []


@pytest.mark.parametrize("name", [name for name in LISTED if name.startswith(("cuda", "hip"))])
def test_gpus_have_all_fields_and_plausible_figures(name: str) -> None:
    target = Target.parse(name)
    figures = target.figures
    assert {name for name in figures if name != "capability"} == set(Target.parse("cuda:sm_80").figures) - {
        "capability",
        *(("device_address_bits",) if target.platform == "hip" else ()),
    }
    assert 2e11 < figures["memory_bandwidth"] < 1e13
    assert 8e9 < target.memory_sizes[0] <= target.memory_sizes[-1] == figures["device_memory_size"] < 4e11
    assert figures["shared_memory_per_block_optin"] <= figures["shared_memory_per_core"]
    assert figures["threads_per_warp"] in (32, 64)
    config = gpu_config(target)
    for field, value in figures.items():
        if field not in ("name", "code", "capability"):
            assert re.search(rf"^  {field}: {re.escape(str(value))}$", config, re.M)
    assert config.count("{") == config.count("}")
    if target.platform == "cuda":
        major, minor = figures["capability"].split(".")
        assert f"cuda_compute_capability {{ major: {major} minor: {minor} " in config
        assert figures["code"].removesuffix("a") == target.arch == f"sm_{major}{minor}"
        assert ("ACCELERATED_FEATURES" in config) == figures["code"].endswith("a")
    else:
        assert f'gcn_arch_name: "{figures["code"]}"' in config and figures["code"].split(":")[0] == target.arch


def test_default_tiles_do_not_ship() -> None:
    assert xla_options(Target.parse("cuda"), "block_t8")["xla_gpu_experimental_cost_model_gemm_tiling_default"] is True
    assert xla_options(Target.parse("cpu:x86-64-v3"), "block_t8") == {}


@pytest.mark.parametrize("arch", spec_files.architectures("cuda"))
@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128, 512])
def test_the_tiles_of_a_step_fit_into_shared_memory(arch: str, element: Element, tokens: int) -> None:
    target = Target.parse(f"cuda:{arch}")
    options = xla_options(target, f"step_t{tokens}_r8", Products(element))
    assert options["xla_gpu_experimental_force_split_k"] == 1, "the tile's own split_k is not asked"
    given = str(options["xla_gpu_override_gemm_autotuner"])
    tile = {name: int(value) for name, value in re.findall(r"(\w+): (\d+)", given)}
    stage = (tile["block_m"] + tile["block_n"]) * tile["block_k"] * {"float32": 4, "bfloat16": 2}[element]
    assert tile["split_k"] == 1 and tile["num_stages"] >= 2
    assert stage * tile["num_stages"] < target.figures["shared_memory_per_block_optin"]
    assert tile["block_n"] == (32 if tokens <= 64 else tile["block_n"])


def test_the_vendors_library_is_for_its_own_gpus() -> None:
    products = Products("bfloat16", use_vendor_blas=True)
    assert xla_options(Target.parse("cuda:sm_90"), "step_t8_r8", products) == {"xla_gpu_enable_triton_gemm": False}
    with pytest.raises(ConfigError, match="NVIDIA's GPUs, and hip:gfx942 is none"):
        xla_options(Target.parse("hip:gfx942"), "block_t8", products)
    assert compat.stamp(Target.parse("cuda:sm_90"), uses_vendor_blas=True)["libraries"] == ["libcublasLt.so.13"]


@pytest.mark.parametrize(("executable", "rows"), [("block_t8", 16), ("block_t512", 64), ("sample_full_r8", 16)])
def test_gpus_of_amd_have_tiles_that_fit_their_registers(executable: str, rows: int, tmp_path: Path) -> None:
    tiles = xla_options(Target.parse("hip:gfx1201"), executable)["xla_gpu_override_gemm_autotuner"]
    assert str(tiles).startswith(f"block_m:{rows},")
    products = Products(autotune=tmp_path / "results")
    measured = xla_options(Target.parse("hip:gfx1100"), executable, products)
    assert measured == {"xla_gpu_load_autotune_results_from": str(tmp_path / "results")}


# --- CPUs ----------------------------------------------------------------------------------------------------------


def test_levels_grow() -> None:
    v1, v2, v3, v4 = (set(cpu_features.level_features(f"x86-64{level}")) for level in ("", "-v2", "-v3", "-v4"))
    assert v1 < v2 < v3 < v4
    assert v2 - v1 == {"crc32", "cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"}
    assert "avx512f" in v4 and not any(name.startswith("avx512") for name in v3)
    for arch in ("znver4", "sapphirerapids"):
        assert v4 < set(cpu_features.level_features(arch))


@pytest.mark.parametrize("arch", spec_files.architectures("cpu"))
def test_the_flags_of_a_level_are_names_that_hosts_are_asked_for(arch: str) -> None:
    flags = cpu_features.level_flags(arch)
    assert set(flags) <= cpu_features.ISA_FLAGS
    assert len(flags) >= len(cpu_features.level_features(arch)) - 1  # crc32 has no name of its own


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists instruction sets there")
def test_host_features_are_those_of_the_kernel_without_what_only_virtualizes() -> None:
    words = set(Path("/proc/cpuinfo").read_text().split())
    features = cpu_features.host_features()
    assert list(features) == sorted(set(features))
    assert set(features) <= words
    assert {"sse2", "fp"} & set(features), "x86-64 has sse2, arm64 has fp"
    assert not {"hypervisor", "constant_tsc", "vmx"} & set(features)


def test_the_host_is_a_target() -> None:
    target = Target.parse("cpu")
    assert target.is_native and target.runs_here()
    assert target.spec() == {
        "platform": "cpu",
        "arch": "native",
        "machine": platform.machine(),
        "features": list(cpu_features.host_features()),
    }
    assert not Target.parse("cuda").runs_here()


def test_missing_features() -> None:
    target = Target("cpu", "native", features=("avx2", "fma"))
    assert target.missing_features(["fma", "avx2"]) == []
    assert target.missing_features(["avx512f", "fma", "amx_tile"]) == ["amx_tile", "avx512f"]


# --- the stamp -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTED)
def test_an_artifact_of_a_target_fits_that_target_and_no_other_platform(name: str) -> None:
    target = Target.parse(name)
    stamp = json.loads(json.dumps(compat.stamp(target)))
    compat.check(stamp, target)
    for other in ("cuda:sm_86", "hip:gfx950", "tpu:v5e", "cpu:native"):
        if other.split(":")[0] != target.platform:
            with pytest.raises(CacheError, match=f"compiled for {name} and cannot run on {other}"):
                compat.check(stamp, Target.parse(other))


def test_code_of_another_architecture_is_refused() -> None:
    with pytest.raises(CacheError, match="its code is sm_90a, and the device takes sm_100a"):
        compat.check(compat.stamp(Target.parse("cuda:sm_90")), Target.parse("cuda:sm_100"))


def test_code_for_a_mesh_needs_as_many_devices() -> None:
    one, two = Target.parse("cuda:sm_90"), Target.parse("cuda:sm_90:1x1x2")
    assert compat.stamp(two)["devices"] == 2
    with pytest.raises(CacheError, match="for cuda:sm_90:1x1x2 and cannot run on cuda:sm_90: it runs on 2 devices"):
        compat.check(compat.stamp(two), one)
    with pytest.raises(CacheError, match="it runs on 1 devices together, and here 2"):
        compat.check(compat.stamp(one) | {"form": "lowered"}, two)


def test_code_for_more_than_a_host_has_is_refused() -> None:
    stamp = compat.stamp(Target.parse("cpu:x86-64-v4"))
    with pytest.raises(CacheError, match="cannot run on cpu:x86-64-v3: it needs avx512bw, avx512cd"):
        compat.check(stamp, Target.parse("cpu:x86-64-v3"))
    compat.check(compat.stamp(Target.parse("cpu:x86-64-v2")), Target.parse("cpu:x86-64-v3"))


def test_code_of_another_jaxlib_is_refused() -> None:
    target = Target.parse("cpu")
    stamp = compat.stamp(target) | {"jaxlib": "0.9.9"}
    with pytest.raises(CacheError, match=r"compiled by jaxlib 0\.9\.9, and here is \d"):
        compat.check(stamp, target)
    device = Target.parse("cuda:sm_90")
    with pytest.raises(CacheError, match=r"compiled by jax-cuda13-pjrt 0\.9\.9, and here is"):
        compat.check(compat.stamp(device) | {"packages": {"jax-cuda13-pjrt": "0.9.9"}}, device)


# --- listing -------------------------------------------------------------------------------------------------------


def test_the_listing_has_every_target_once() -> None:
    rows = list(target_rows())
    assert sorted(row.target for row in rows) == sorted(LISTED)
    assert sorted(name for row in rows for name in [row.target, *row.default_for]) == sorted(target_names())
    by_name = {row.target: row for row in rows}
    assert by_name["cpu:native"].can_run and by_name["cpu:native"].can_compile
    for row in rows:
        plugin = PLUGINS.get(row.target.split(":")[0])
        assert row.can_compile == (not row.missing and not row.reason)
        assert bool(row.install) == bool(row.missing)
        if plugin and row.missing:
            assert row.install == f"pip install 'max-jax[{plugin.extra}]'"


def test_devices_are_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, version in enumerate((0, 90402, 90010, 120001)):
        folder = tmp_path / "kfd" / str(node)
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"simd_count 4\ngfx_target_version {version}\n")
    monkeypatch.setattr(attached, "_KFD_NODES", tmp_path / "kfd")
    assert attached._amd() == ("gfx942", "gfx90a", "gfx1201")
    for name, vendor, kind in (("a", "0x1ae0", "0x0063"), ("b", "0x10de", "0x0063"), ("c", "0x1ae0", "0x006f")):
        folder = tmp_path / "pci" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(kind + "\n")
    monkeypatch.setattr(attached, "_PCI_DEVICES", tmp_path / "pci")
    assert attached._google() == ("v5e", "v6e")
