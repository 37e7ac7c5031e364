"""Starts JAX with the configuration that experiments assume, and the compiler's options."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from lab.environment.compile_cache import prune_ours
from lab.errors import UserError

if TYPE_CHECKING:
    import jax

# JAX settings that change results but are not fields of an experiment, with the values that experiments assume.
NUMBERS = {"jax_enable_x64": False, "jax_default_matmul_precision": None, "jax_default_prng_impl": "threefry2x32",
           "jax_threefry_partitionable": True, "jax_random_seed_offset": 0, "jax_legacy_prng_key": "allow",
           "jax_numpy_dtype_promotion": "standard"}


def fix_numbers() -> list[str]:
    """Resets the settings in `NUMBERS`, which change results but not the fingerprint; returns those it changed."""
    import jax

    known = {name: value for name, value in NUMBERS.items() if hasattr(jax.config, name)}
    other = [name.upper() for name, value in known.items() if getattr(jax.config, name) != value]
    for name in other:
        jax.config.update(name.lower(), known[name.lower()])
    return other


def start_jax() -> str:
    """Starts JAX and returns its platform, which must be the one that the launcher chose. Prints a note for each JAX
    setting of the environment that it overrides (`fix_numbers`).

    Raises:
      UserError: JAX uses another platform. A silent fallback to the CPU could waste days.
    """
    import jax

    # Runs each CPU step in the calling thread, whose malloc arena is the only one that may grow large. In other threads
    # temporaries above 64 MiB were mmapped and page-faulted at every step (local config of gpt_small: 142 ms, now 123).
    # A single arena for all threads has too much lock contention (gpt_char, bfloat16: 34 ms, now 28).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    prune_ours()
    if other := fix_numbers():
        print(f"note: {', '.join(other)} would change the numbers of an experiment without its fingerprint, and is not "
              f"used. --precision says in which type it computes.", file=sys.stderr, flush=True)
    wanted = os.environ.get("LAB_PLATFORM")
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as e:  # AssertionError: this build lacks the platform
        asked = os.environ.get("JAX_PLATFORMS")
        reason = (str(e).splitlines() or [f"this build of JAX has no {asked}"])[0].partition(" (set ")[0][:160]
        raise UserError(f"JAX found no device{f' with JAX_PLATFORMS={asked}' if asked else ''}: {reason}. Check the "
                        f"driver, or leave out JAX_PLATFORMS and say what you want: "
                        f"LAB_ACCELERATOR=cpu|cuda12|cuda13|tpu ./launch.sh ...") from e
    if found == "gpu" and jax.device_count() == 1:
        # One kernel for random bits instead of 100 operations fused into every use: the init of gpt_small compiles in
        # 6 s instead of 104 on 2 cores. Same bits. One device only, because the kernel cannot be partitioned.
        jax.config.update("jax_threefry_gpu_kernel_lowering", True)
    if wanted and found != wanted:
        raise UserError(f"The launcher chose {wanted}, but JAX uses {found}. Check the driver, or say what you want: "
                        f"LAB_ACCELERATOR=cpu|cuda12|cuda13|tpu ./launch.sh ...")
    return found


# XLA runs the algebraic simplifier once more on a partitioned program, which changes bits compared with one device.
EXACT = {"xla_disable_hlo_passes": "algsimp"}
# cuBLAS fuses biases and residuals into the matmul, XLA's Triton matmuls do not. gpt_small on an H100, 64 rows of 1,024
# tokens: 135.3 ms per step with Triton, 131.9 without.
GPU = {"xla_gpu_enable_triton_gemm": False}
DETERMINISTIC = {"xla_gpu_deterministic_ops": True}


def compiler_options(mesh: jax.sharding.Mesh, deterministic: bool) -> dict[str, Any]:
    """XLA options of every program of an experiment on a mesh."""
    gpu = mesh.devices.flat[0].platform == "gpu"
    return GPU | (DETERMINISTIC if deterministic else {}) if gpu else {}
