"""How JAX is started."""

from __future__ import annotations

import os
import sys

from lab.environment.compile_cache import prune_ours
from lab.errors import UserError

# JAX's settings that decide numbers and that no experiment knows of, each as an experiment means it.
NUMBERS = {"jax_enable_x64": False, "jax_default_matmul_precision": None, "jax_default_prng_impl": "threefry2x32",
           "jax_threefry_partitionable": True, "jax_random_seed_offset": 0, "jax_legacy_prng_key": "allow",
           "jax_numpy_dtype_promotion": "standard"}


def fix_numbers() -> list[str]:
    """Sets what would give other numbers under the same fingerprint as JAX has it by default; returns what was not."""
    import jax

    known = {name: value for name, value in NUMBERS.items() if hasattr(jax.config, name)}
    other = [name.upper() for name, value in known.items() if getattr(jax.config, name) != value]
    for name in other:
        jax.config.update(name.lower(), known[name.lower()])
    return other


def start_jax() -> str:
    """Starts JAX and returns its platform, which must be the one that the launcher chose. Says which of JAX's settings
    it does not take from the environment: see `fix_numbers`.

    Raises:
      UserError: it is another one; a silent fall to the CPU would cost days.
    """
    import jax

    # On CPUs an update then runs in the thread that asks for it, and malloc gives that thread the one heap that may be
    # large. Temporaries above 64 MiB from another one were mapped and faulted in anew at every update (local config of
    # gpt_small: 142 ms, now 123), and one heap for all threads is locked too often (gpt_char, bfloat16: 34 ms, now 28).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    prune_ours()
    if other := fix_numbers():
        print(f"note: {', '.join(other)} would change the numbers of an experiment without its fingerprint, and is not "
              f"used. --precision says in which type it computes.", file=sys.stderr, flush=True)
    wanted = os.environ.get("LAB_PLATFORM")
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as e:  # JAX asserts that there is a platform where its build lacks the one
        asked = os.environ.get("JAX_PLATFORMS")
        reason = (str(e).splitlines() or [f"this build of JAX has no {asked}"])[0].partition(" (set ")[0][:160]
        raise UserError(f"JAX found no device{f' with JAX_PLATFORMS={asked}' if asked else ''}: {reason}. Check the "
                        f"driver, or leave out JAX_PLATFORMS and say what you want: "
                        f"LAB_ACCELERATOR=cpu|cuda12|cuda13|tpu ./launch.sh ...") from e
    if found == "gpu" and jax.device_count() == 1:
        # One kernel for all random bits instead of 100 operations fused into each use of them: the first state of
        # gpt_small compiles in 6 s instead of 104 on 2 cores. The bits are the same. No mesh can divide that kernel.
        jax.config.update("jax_threefry_gpu_kernel_lowering", True)
    if wanted and found != wanted:
        raise UserError(f"The launcher chose {wanted}, but JAX uses {found}. Check the driver, or say what you want: "
                        f"LAB_ACCELERATOR=cpu|cuda12|cuda13|tpu ./launch.sh ...")
    return found
