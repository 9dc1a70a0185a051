"""A GPU as XLA's compiler takes it: GpuTargetConfigProto in protobuf's text form."""

from __future__ import annotations

from . import spec_files
from .target import Target


def gpu_config(target: Target) -> str:
    """The figures of a GPU target, and the versions of libraries that a host must at least have."""
    figures, versions = dict(target.figures), spec_files.versions(target.platform)
    name, code = figures.pop("name"), figures.pop("code")
    toolkit, dnn = versions["toolkit"], versions["dnn"]
    if target.platform == "cuda":
        major, minor = figures.pop("capability").split(".")
        feature = "ACCELERATED_FEATURES" if code.endswith("a") else "NONE"
        arch = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}"
        vendor, platform = "NVIDIA Corporation", "CUDA"
    else:
        arch = f'rocm_compute_capability {{ gcn_arch_name: "{code}" }}'
        vendor, platform = "Advanced Micro Devices, Inc", "ROCM"
    numbers = "\n".join(f"  {field}: {value}" for field, value in figures.items())
    parts = " ".join(
        f"{part}: {digits}" for part, digits in zip(("major", "minor", "patch"), dnn.split("."), strict=True)
    )
    return f"""gpu_device_info {{
{numbers}
  {arch}
  device_vendor: "{vendor}" name: "{name}"
  driver_version: "{toolkit}" runtime_version: "{toolkit}" compile_time_toolkit_version: "{toolkit}"
  dnn_version: "{dnn}"
}}
platform_name: "{platform}"
dnn_version_info {{ {parts} }}
device_description_str: "{name}"
"""
