"""Machines to plan a run for: chip specifications and interconnect topologies.

Peaks are vendor figures, which no program reaches, so times computed from them are lower bounds.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lab.errors import UserError

GB, MiB, GiB, TB = 10**9, 2**20, 2**30, 10**12

HOPPER = "major: 9 feature_extension: ACCELERATED_FEATURES"
# Constant fields of XLA's GPU target config: CUDA limits (the same since Volta) and the versions to compile for.
GPU = """gpu_device_info {
    %s
    device_vendor: "NVIDIA Corporation" name: "%s" device_address_bits: 64
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
    thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0" }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "%s"
"""


@dataclass(frozen=True)
class Chip:
    """Specification of one device; None: unknown."""

    kind: Literal["tpu", "gpu", "cpu"]
    memory: int | None = None
    """Bytes available to a program."""
    flops: Mapping[str, float] | None = None
    """Precision -> peak FLOP/s of dense matmuls with JAX's default settings."""
    bandwidth: float | None = None
    """Main memory bandwidth in bytes/s."""
    link: float | None = None
    """Bandwidth of one link to a neighbour in one direction, in bytes/s."""
    full: tuple[int, ...] = ()
    """TPU: shape of a whole pod, in chips."""
    cores: int = 1
    """Cores per chip in Google's names: a v4-32 has 16 chips, a v5e-32 has 32."""
    target: str = ""
    """GPU: device-specific fields of XLA's GpuDeviceInfoProto, as text."""


def _tpu(teraflops: float, memory: float, gigabytes: float, bidirectional: float, full: tuple[int, ...],
         cores: int) -> Chip:
    # Float32 matmuls have the same peak: by default a TPU computes them in one bfloat16 pass. The published bandwidth
    # is the sum over all links of a chip in both directions.
    link = bidirectional * GB / (4 * len(full))
    return Chip("tpu", round(memory * GiB), dict.fromkeys(("bfloat16", "float32"), teraflops * TB), gigabytes * GB,
                link, full, cores)


def _gpu(memory: int, bfloat16: float, float32: float, gigabytes: float, link: float, *, capability: str,
         processors: int, units: int, shared: int, cache: int, clock: float) -> Chip:
    target = f"""cuda_compute_capability {{ {capability} }} core_count: {processors} fpus_per_core: {units}
        shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024} l2_cache_size: {cache * MiB}
        clock_rate_ghz: {clock} device_memory_size: {memory} memory_bandwidth: {gigabytes * GB:.0f}"""
    return Chip("gpu", round(0.75 * memory), {"bfloat16": bfloat16 * TB, "float32": float32 * TB}, gigabytes * GB,
                link * GB, target=target)


# Sources. TPU: peak, HBM bandwidth and inter-chip bandwidth of each chip on cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e},
# read in November 2026; v4's inter-chip bandwidth (6 links of 50 GB/s) from Jouppi et al. 2023 ("TPU v4: An Optically
# Reconfigurable Supercomputer"). Memory: libtpu's limit for a program, which is less than the chip has.
# NVIDIA: data sheets of A100 80 GB SXM, H100 SXM and H200 SXM (dense, TF32 for float32, NVLink per direction); memory
# and the other target fields from their CUDA device properties. JAX lets programs use three quarters of the memory.
CHIPS = {
    "v4": _tpu(275, 30.75, 1200, 600, (16, 16, 16), 2),
    "v5e": _tpu(197, 15.75, 819, 400, (16, 16), 1),
    "v5p": _tpu(459, 95.74, 2765, 1200, (16, 20, 28), 2),
    "v6e": _tpu(918, 31.25, 1638, 800, (16, 16), 1),
    "a100": _gpu(85_100_068_864, 312, 156, 2039, 300, capability="major: 8 minor: 0", processors=108, units=64,
                 shared=167_936, cache=40, clock=1.41),
    "h100": _gpu(84_942_979_072, 989, 494, 3350, 450, capability=HOPPER, processors=132, units=128,
                 shared=233_472, cache=50, clock=1.98),
    "h200": _gpu(151_397_597_184, 989, 494, 4800, 450, capability=HOPPER, processors=132, units=128,
                 shared=233_472, cache=50, clock=1.98),
    "cpu": Chip("cpu"),
}

# Slices that Google offers: chips -> shape.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
         1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}


@dataclass(frozen=True)
class Topology:
    """A set of identical devices and their interconnect."""

    name: str
    chip: Chip
    devices: int
    shape: tuple[int, ...] = ()
    """TPU: shape of the slice, in chips."""

    @property
    def links(self) -> int:
        """Links of an inner chip: 2 per axis, or 1 if the axis has only 2 chips. GPU: 1, to the switch."""
        if self.chip.kind != "tpu":
            return 1
        return sum(min(n - 1, 2) for n in self.shape)

    @property
    def network(self) -> float | None:
        """Bytes/s that a device can send over all its links; None: unknown, or a single device."""
        return self.chip.link * self.links if self.chip.link and self.devices > 1 and self.links else None


def names() -> str:
    """The names accepted by `find`, for messages."""
    flat, cubes = (f"{{{','.join(str(n * cores) for n in sizes)}}}" for sizes, cores in ((FLAT, 1), (CUBES, 2)))
    gpus = ", ".join(f"{name}:N" for name, chip in CHIPS.items() if chip.kind == "gpu")
    return f"cpu:N, v5e-{flat}, v6e-{flat}, v4-{cubes}, v5p-{cubes}, {gpus}"


def find(name: str) -> Topology:
    """The topology of a name: ``cpu:8``, ``h100:8``, ``v5e-256`` (256 chips), ``v4-32`` or ``v5p-32`` (16 chips).

    Raises:
      UserError: unknown machine; lists the known ones.
    """
    found = re.fullmatch(r"(\w+)([-:])(\d{1,6})", name.lower())
    chip = CHIPS.get(found[1]) if found else None
    if chip is not None and (found[2] == "-") == (chip.kind == "tpu") and int(found[3]) > 0:
        if chip.kind == "gpu" and int(found[3]) > 8 and int(found[3]) % 8:
            raise UserError(f"--on {name}: more than 8 GPUs must be a multiple of 8, as many as a host has.")
        if chip.kind != "tpu":
            return Topology(name.lower(), chip, int(found[3]))
        devices, odd = divmod(int(found[3]), chip.cores)
        shape = (FLAT if len(chip.full) == 2 else CUBES).get(devices)
        if shape is not None and not odd:
            return Topology(name.lower(), chip, devices, tuple(map(int, shape.split("x"))))
    raise UserError(f"--on {name} is not a machine that can be planned for. There are {names()}.")


def environment(topology: Topology) -> dict[str, str]:
    """Environment variables to set before JAX starts, so that it does not probe for accelerators or a Cloud TPU VM."""
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                 "TPU_ACCELERATOR_TYPE": "v5litepod-16",
                 # libtpu's lock guards the chip, but several processes may compile at once.
                 "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if topology.chip.kind != "cpu":
        variables["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # cached executables cannot be loaded without the chip
    if topology.chip.kind == "cpu" or topology.chip.kind == "gpu" and not can_compile(topology):
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        variables["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.devices}".strip()
    return variables


def can_compile(topology: Topology) -> bool:
    """Whether the compiler for these devices is installed."""
    packages = {"cpu": ("jax",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
    return any(importlib.util.find_spec(name) for name in packages[topology.chip.kind])


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for. TPUs and GPUs are AOT topology devices, which cannot execute. Without JAX's GPU packages,
    CPU devices stand in for GPUs, for tracing only.

    Raises:
      UserError: a required package is not installed, or JAX has started with fewer CPU devices.
    """
    import jax

    if topology.chip.kind == "tpu":
        if not can_compile(topology):
            raise UserError(f"Compiling for {topology.name} needs libtpu, the TPU's compiler: "
                            f"LAB_EXTRAS=plan ./launch.sh plan ...")
        options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(topology.shape) == 1 else {}
        if topology.name.startswith("v4"):  # its two cores form one device
            options["chip_config_name"] = "megacore"
        shape = "x".join(map(str, topology.shape))
        return _described("tpu", f"{topology.name.partition('-')[0]}:{shape}", **options)
    found = jax.devices("cpu")  # starts JAX, which loads its GPU packages
    if topology.chip.kind == "gpu" and can_compile(topology):
        name, hosts = topology.name.partition(":")[0].upper(), -(-topology.devices // 8)
        return _described("cuda", "", topology=f"1x{hosts}x{topology.devices // hosts}",
                          target_config=GPU % (topology.chip.target, name, name))
    if len(found) < topology.devices:
        raise UserError(f"--on {topology.name} needs {topology.devices} CPU devices; JAX has started with "
                        f"{len(found)}.")
    return found[: topology.devices]


def _described(platform: str, name: str, **options: Any) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except (NotImplementedError, RuntimeError, ValueError) as e:
        raise UserError(f"JAX's compiler for {platform} is installed and does not start: "
                        f"{str(e).splitlines()[0][:300]}. Plan for another machine.") from e
