"""How JAX is started."""

from __future__ import annotations

import os

from lab.compile_cache import prune_ours
from lab.errors import UserError


def start_jax() -> str:
    """Starts JAX and returns its platform, which must be the one that the launcher chose.

    Raises:
      UserError: it is another one; a silent fall to the CPU would cost days.
    """
    import jax

    # On CPUs an update then runs in the thread that asks for it, and malloc gives that thread the one heap that may be
    # large. Temporaries above 64 MiB from another one were mapped and faulted in anew at every update (twin of
    # gpt_small: 142 ms, now 123), and one heap for all threads is locked too often (gpt_char, bfloat16: 34 ms, now 28).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    prune_ours()
    wanted = os.environ.get("LAB_PLATFORM")
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as e:  # JAX asserts that there is a platform where its build lacks the one
        asked = os.environ.get("JAX_PLATFORMS")
        reason = (str(e).splitlines() or [f"this build of JAX has no {asked}"])[0].partition(" (set ")[0][:160]
        raise UserError(f"JAX found no device{f' with JAX_PLATFORMS={asked}' if asked else ''}: {reason}. Check the "
                        f"driver, or leave out JAX_PLATFORMS and say what you want: "
                        f"LAB_ACCELERATOR=cpu|cuda12|cuda13|tpu ./launch.sh ...") from e
    if wanted and found != wanted:
        raise UserError(f"The launcher chose {wanted}, but JAX uses {found}. Check the driver, or say what you want: "
                        f"LAB_ACCELERATOR=cpu|cuda12|cuda13|tpu ./launch.sh ...")
    return found
