"""The steps of run.py, each a function: `python -m tests.gpu.steps NAME` prints its findings, a line of JSON each.

With LAB_GPU_TINY in the environment everything is small enough for a CPU, to rehearse.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.gpu.run import MARK, ROOT

TINY = bool(os.environ.get("LAB_GPU_TINY"))
SCRATCH = Path(os.environ.get("LAB_GPU_SCRATCH", "/tmp/lab-gpu"))
TINY_GPT = {"depth": 2, "width": 32, "heads": 2}
# What may matter for gpt_small, most promising first: fields of the experiment, options of XLA.
SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "64 rows at once, chunks of 256": ({}, ()),
    "products by XLA, too": ({}, ("xla_gpu_enable_triton_gemm=true",)),
    "no chunks": ({"task.chunk": None}, ()),
    "deterministic": ({"deterministic": True}, ()),
    "latency hiding": ({}, ("xla_gpu_enable_latency_hiding_scheduler=true",)),
    "remat dots": ({"model.remat": "dots"}, ()),
    "4 microbatches": ({"grad_accum_steps": 4}, ()),
}


def found(name: str, **figures: Any) -> None:
    """Writes down one finding."""
    print(MARK + json.dumps({"what": name, **figures}), flush=True)


def launch(*words: str | Path, more: Mapping[str, str] = {}, timeout: float | None = None) -> tuple[float, str]:
    """(seconds, output) of ./launch.sh; raises where it does not end with status 0."""
    began = time.monotonic()
    done = subprocess.run([ROOT / "launch.sh", *map(str, words)], env={**os.environ, **more}, timeout=timeout,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words} ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return time.monotonic() - began, done.stdout


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


Job = tuple[Any, tuple[str, ...]]
"""An experiment, and options of XLA."""


def jobs() -> dict[str, Callable[[], Job]]:
    """Name -> what `bench` measures, by step."""
    def setting(name: str) -> Job:
        fields, xla = SETTINGS[name]
        return gpt("gpt_small", **{"batch": 64, "grad_accum_steps": 1, **fields}), xla

    names = list(SETTINGS)[:2] if TINY else list(SETTINGS)
    vision = (("imagenet_vit_s16", 512), ("imagenet_resnet50", 256))[: 1 if TINY else 2]
    rates = (0.0,) if TINY else (0.1, 0.0)  # cuDNN's attention takes no dropout
    return {**{f"gpt_small: {name}": functools.partial(setting, name) for name in names},
            "gpt_medium: 32 rows at once": lambda: (gpt("gpt_medium", batch=32, grad_accum_steps=1), ()),
            "kernels: gpt_small": lambda: (gpt("gpt_small", batch=64, grad_accum_steps=1),
                                           # A trace gives no names to the operations inside a graph of CUDA.
                                           ("xla_gpu_enable_command_buffer=",)),
            **{f"images: {name}, {batch} at once": functools.partial(image_job, name, batch) for name, batch in vision},
            **{f"images: bert_base, 64 texts, dropout {rate}": functools.partial(bert_job, rate) for rate in rates},
            "fashion: on the device": fashion_job}


def bench(name: str, experiment: Any, updates: int, xla: Sequence[str] = ()) -> dict[str, Any] | None:
    """Finds what `./launch.sh bench` says of an experiment; a setting that fails is a finding, too."""
    from lab.commands.bench import BenchOptions, measure

    options = BenchOptions(timed_steps=3 if TINY else updates, breakdown=False, xla=() if TINY else tuple(xla))
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the table
            figures = measure(experiment, options)
    except Exception as e:  # out of memory, say: the other settings still count
        found(name, failed=f"{type(e).__name__}: {e}"[:300])
        return None
    finally:
        gc.collect()
    keep = ("device", "time_to_first_step_seconds", "ms_per_step",
             "tokens_per_second", "images_per_second", "records_per_second", "mfu",
            "compile_seconds", "data_wait_ms", "host_ms", "temporary_bytes", "peak_device_bytes")
    found(name, **{key: figures[key] for key in keep if figures.get(key) is not None},
          seconds=round(time.monotonic() - began, 1))
    return figures


def gpt(name: str, **fields: Any) -> Any:
    """An experiment of a GPT on the standard library's text, with 50,304 rows of vocabulary."""
    from lab.configuration.values import override
    from lab.train.experiment_file import load
    from tests.gpu import gpt_stdlib

    experiment = gpt_stdlib.on_stdlib(load(ROOT / f"experiments/{name}.py").experiment)
    if TINY:
        model = experiment.model.clone(**TINY_GPT, context=64, vocab=2048)
        experiment = replace(experiment, model=model, batch=4, data=replace(gpt_stdlib.small.data, length=64))
        fields = {
            key: min(value, 4) if key in ("batch", "grad_accum_steps") else value for key, value in fields.items()
        }
    return override(experiment, {"steps": 1000, **fields})


# ------------------------------------------------------------------------------------------------------- the steps

def devices() -> None:
    """1. Devices, versions, the launcher's environment."""
    import importlib.metadata

    import jax

    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy",
             "torch", "nvidia-cudnn-cu13")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    found("versions", python=sys.version.split()[0], **versions)
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    found("devices", kind=device.device_kind, count=jax.device_count(), platform=device.platform,
          memory=memory.get("bytes_limit", 0), cores=os.cpu_count())
    with contextlib.suppress(OSError):
        smi = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,power.limit",
                              "--format=csv,noheader"], capture_output=True, text=True)
        found("nvidia-smi", says=smi.stdout.strip())
    seen = ("JAX_PLATFORMS", "LAB_PLATFORM", "LAB_ACCELERATOR", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    found("environment", **{name: os.environ.get(name, "") for name in seen})


def prepare() -> None:
    """1. Compiles, four at once, what the later steps measure, so that they find it in JAX's cache."""
    began = time.monotonic()
    gpt("gpt_small").data.load()  # the text, tokenised once
    found("data", seconds=time.monotonic() - began)
    environ = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def compiled(name: str) -> None:
        done = subprocess.run([sys.executable, "-P", "-m", "tests.gpu.steps", "compile", name], cwd=ROOT, env=environ,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            found(name, failed=done.stdout[-300:])

    # Four fit into the memory of one GPU. Where it runs out, the compiler chooses slow products without an error.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compiled, list(jobs())[: 1 if TINY else None]))


def compile_job(name: str) -> None:
    """One of `jobs`, compiled and not run."""
    from lab.commands.bench import xla_options
    from lab.train.check import load_data
    from lab.train.program import Program

    began = time.monotonic()
    experiment, xla = jobs()[name]()
    program = Program(experiment, load_data(experiment).train)
    program.options = program.options | xla_options(() if TINY else xla)
    loaded = time.monotonic()
    _ = program.compiled
    compiled = time.monotonic()
    program.init()
    found(name, load_seconds=loaded - began, compile_seconds=compiled - loaded,
          init_seconds=time.monotonic() - compiled)


def main_job() -> None:
    """1. The main job's local config: its time, and its losses beside the CPU's of the same machine."""
    steps = 12 if TINY else 100
    flags = ["experiments/gpt_small.py", "--local"]
    if TINY:
        flags += ["--model.depth", "2", "--model.width", "32", "--batch", "4", "--task.samples", "0"]
    else:
        seconds, _ = launch(*flags, "--run-dir", SCRATCH / "main")
        result = json.loads((SCRATCH / "main/result.json").read_text())
        found("the main job", seconds=seconds, ms_per_step=1000 * result["seconds_per_step"],
              bits_per_byte=result["final"]["bits_per_byte"], compile_seconds=result["compile_seconds"])
    curves = {}
    for platform in ("here", "cpu"):
        more = {"LAB_ACCELERATOR": "cpu", "LAB_PLATFORM": "cpu", "JAX_PLATFORMS": "cpu"} if platform == "cpu" else {}
        folder = SCRATCH / f"curve-{platform}"
        seconds, _ = launch(*flags, "--steps", str(steps), "--evaluate.records", "64", "--run-dir", folder, more=more)
        curves[platform] = [row["loss"] for row in rows_of(folder, "train")]
        compiled = json.loads((folder / "result.json").read_text())["compile_seconds"]
        found(f"{steps} steps on {platform}", seconds=seconds, compile_seconds=compiled,
              curve=[round(x, 4) for x in curves[platform]])
    apart = [abs(a - b) for a, b in zip(curves["here"], curves["cpu"], strict=True)]
    found("losses beside the CPU's", first=apart[0], first_ten=max(apart[:10]), most=max(apart),
          mean=sum(apart) / len(apart), close=max(apart[:10]) < 0.02 and max(apart) < 0.15)


def checks() -> None:
    """2. `pytest -m gpu`. What a test says is found at once: the step may be stopped before the last one ends."""
    figures = SCRATCH / "figures.jsonl"
    more = {"LAB_TEST_PLATFORM": "cpu" if TINY else "gpu", "LAB_TEST_GPU": str(figures),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    words = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "tests/gpu", "-n", "2" if TINY else "6", "-vv",
             "--dist", "load", "--durations", "12", "-p", "no:cacheprovider"]
    if TINY:
        words += ["-k", "uses_the_device or 197-all-holes-2 or BERT or bfloat16 or greedy or killed"]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **more}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    # Interrupted, pytest still says why tests failed; run.py's limit ends everything at once.
    timer = threading.Timer(float(os.environ.get("LAB_GPU_SECONDS", "600")) - 10, process.send_signal, [signal.SIGINT])
    timer.daemon = True
    timer.start()
    passed, lines, last = 0, [], ""
    for line in process.stdout:
        lines, last = [*lines[-200:], line.rstrip()], line.strip() or last
        passed += " PASSED " in line
        if re.search(r" (FAILED|ERROR|SKIPPED) tests", line) or re.match(r"E  |\d+\.\d+s call", line):
            found("test", says=line.strip()[:100])
        elif " PASSED " in line:
            found("passed", number=passed, last=line.split("::")[-1].strip()[:90])
    for said in figures.read_text().splitlines() if figures.exists() else ():
        found("figure", **json.loads(said))
    found("pytest", status=process.wait(), says=last)
    if process.returncode:
        print("\n".join(lines))
        raise SystemExit(process.returncode)


def gpt_small() -> None:
    """3. gpt_small, 64 rows of 1,024 tokens: the settings that matter, and the best."""
    best: tuple[float, str] = (float("inf"), "none")
    for name, figures in measured("gpt_small", 15):
        best = min(best, (figures["ms_per_step"], name))
        found("best so far", setting=best[1], ms=best[0])


def measured(step: str, updates: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`bench` of the jobs of a step; those that fail are findings only."""
    for name, job in jobs().items():
        if name.startswith(f"{step}: "):
            experiment, xla = job()
            figures = bench(name, experiment, updates, xla)
            if figures:
                yield name, figures


def torch() -> None:
    """3. PyTorch, compiled, with flash attention and fused AdamW, and lab, in turns."""
    tiny = ["--model.depth", "2", "--model.width", "32", "--model.heads", "2"] if TINY else []
    # As many steps as in `gpt`, so that lab's program is the one that `prepare` has compiled.
    sizes = ["--local" if TINY else "--full", "--batch", "4" if TINY else "64", "--grad-accum-steps", "1"]
    sizes += ["--steps", "1000"]
    compare([str(ROOT / "tests/gpu/gpt_stdlib.py"), *sizes, *tiny], "eager" if TINY else "compiled",
            {"optimizer": "fused", "attention": "sdpa"}, rounds=1, updates=3 if TINY else 15)


def compare(words: Sequence[str], forms: str, ways: Mapping[str, str], rounds: int, updates: int) -> None:
    """Finds what compare_torch.py says."""
    try:
        import torch  # noqa: F401
    except ImportError:
        found("PyTorch", failed="it is not installed")
        return
    out = SCRATCH / "compared.json"
    name, *flags = words
    command = [sys.executable, str(ROOT / "tests/benchmarks/compare_torch.py"), name, *flags, "--forms", forms,
               "--ways", json.dumps(ways), "--rounds", str(rounds), "--timed-steps", str(updates), "--json", str(out),
               "--device", "cpu" if TINY else "cuda"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])
    for row in json.loads(out.read_text()):
        for form, found_rows in row["rounds"].items():
            found(f"{Path(row['experiment']).stem} {form}", **{key: value for key, value in found_rows[-1].items()
                                                               if isinstance(value, int | float | str)})
        found(f"{Path(row['experiment']).stem} lab / PyTorch", ratio=row["ratio"], beside=row["best"])


def kernels() -> None:
    """4. Where the time of a step of gpt_small goes, by class, from a trace."""
    import jax

    from lab.commands.bench import xla_options
    from lab.data.pipeline import reader
    from lab.train.program import Program
    from tests.gpu.trace import classes_of, kernels_of

    experiment, xla = jobs()["kernels: gpt_small"]()
    data = experiment.data.load()
    program = Program(experiment, data.train)
    program.options = program.options | xla_options(() if TINY else xla)
    state, batch = program.init(), program.batch(reader(program), 0)
    for _ in range(2):
        state, values = program.train(state, batch)
    jax.block_until_ready(values)
    folder, steps = SCRATCH / "trace", 3
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(steps):
            state, values = program.train(state, batch)
            jax.block_until_ready(values)
    times = kernels_of(folder)
    classes = classes_of(times, program.compiled.as_text())
    total = sum(classes.values())
    for name, microseconds in sorted(classes.items(), key=lambda item: -item[1]):
        found(f"class {name}", ms_per_step=microseconds / 1000 / steps, share=microseconds / total)
    for (name, op), microseconds in sorted(times.items(), key=lambda item: -item[1])[:20]:
        found("kernel", kernel=name[:90], op=op, ms_per_step=microseconds / 1000 / steps)


def gpt_medium() -> None:
    """3. gpt_medium, 32 rows."""
    list(measured("gpt_medium", 10))


def image_job(name: str, batch: int) -> Job:
    """An image model on noise that stays on the device."""
    from lab.configuration.values import override
    from lab.train.experiment_file import load
    from tests.gpu.data import Noise

    side, small = (32, {"batch": 8}) if TINY else (224, {})
    experiment = load(ROOT / f"experiments/{name}.py").experiment
    data = replace(experiment.data, source=Noise(side=side, classes=1000, records=64 if TINY else 1024),
                   shape=(side, side, 3), border=0, resize=False, validation=8)
    fields = {"batch": batch, "grad_accum_steps": 1, "data_on_device": "always", "steps": 100_000, **small}
    experiment = override(replace(experiment, data=data), fields)
    return (replace(experiment, model=experiment.model.clone(depth=1, width=32, heads=2)) if TINY else experiment), ()


def bert_job(dropout: float) -> Job:
    """BERT base on texts of 512 tokens."""
    from lab.train.experiment_file import load

    bert = load(ROOT / "experiments/bert_base.py").experiment
    like = gpt("gpt_small", batch=4 if TINY else 64)
    length = 64 if TINY else 512
    model = bert.model.clone(**(TINY_GPT if TINY else {}), context=length, vocab=like.model.vocab + 1, dropout=dropout)
    return replace(bert, data=replace(like.data, length=length), model=model, batch=like.batch, grad_accum_steps=1), ()


def fashion_job() -> Job:
    """fashion_cnn whose records stay on the device; 92 updates a call, five calls an epoch."""
    from lab.configuration.values import override
    from lab.data.images import Idx
    from lab.train.experiment_file import load
    from tests.gpu.data import write_idx

    folder = SCRATCH / "idx"
    if not folder.is_dir():
        write_idx(folder, side=28, records=512 if TINY else 60_000)
    experiment = load(ROOT / "experiments/fashion_cnn.py").experiment
    data = replace(experiment.data, source=Idx(str(folder)), validation=32 if TINY else 1000)
    n = 2 if TINY else 92
    small = {"model.channels": (4, 8, 8), "model.dense": 16} if TINY else {}
    fields = {**small, "batch": 16 if TINY else 128, "steps_per_call": n, "steps": n * 1000, "data_on_device": "always",
              "evaluate.every": 0, "checkpoint.every": 0}
    return override(replace(experiment, data=data), fields), ()


def images() -> None:
    """5. ResNet-50, ViT-S/16 and BERT base: images and tokens per second."""
    list(measured("images", 20))


def fashion() -> None:
    """5. fashion_cnn: epochs that stay on the device, beside PyTorch's usual loop with a DataLoader."""
    experiment, _ = fashion_job()
    n = experiment.steps_per_call
    for _, figures in measured("fashion", n * 10):
        found("fashion_cnn", epoch_seconds=len(experiment.data.load().train) / figures["images_per_second"])
    flags = ["--data.source.path", str(SCRATCH / "idx"), "--data.validation", str(experiment.data.validation),
             "--data-on-device", "always", "--batch", str(experiment.batch), "--steps-per-call", str(n)]
    flags += ["--model.channels", "4", "8", "8", "--model.dense", "16"] if TINY else []
    compare([str(ROOT / "tests/gpu/fashion_idx.py"), "--full", *flags], "loader" if TINY else "loader,compiled",
            {"optimizer": "fused", "layout": "channels_last"}, rounds=1, updates=2 * n)


def studies() -> None:
    """6. The study of 8 learning rates x 4 seeds: cells one after another, together, and as the engine chooses."""
    rates = "1e-4,2e-4,4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2"
    for name, steps in (("mnist_cnn", 100), ("gpt_char", 100))[: 1 if TINY else 2]:
        seconds = {}
        for way in ("vmap",) if TINY else ("loop", "vmap", "chosen"):
            flags = ["--vary", "optim.lr.peak=" + (rates[:9] if TINY else rates), "--seeds", "1" if TINY else "4",
                     "--steps", "12" if TINY else str(steps), "--optim.lr.warmup", "2", "--evaluate.every", "0",
                     "--evaluate.records", "64", "--checkpoint.every", "0", "--studies", str(SCRATCH / f"{name}-{way}")]
            flags += [] if way == "chosen" else ["--execution", way]
            flags += ["--model.channels", "4", "8"] if TINY else []
            seconds[way], out = launch(f"experiments/{name}.py", "--local", *flags)
            said = [line.strip() for line in out.splitlines() if re.search(r"(?i)vmap|one after another", line)]
            found(f"{name}, 32 cells, {way}", seconds=seconds[way], says=" ".join(said)[:300])
        if "loop" in seconds:
            found(f"{name}, together / one after another", ratio=seconds["vmap"] / seconds["loop"])


def sampling() -> None:
    """7. Tokens per second of a 124M model with a key/value cache: prefill of 512 tokens, and decoding."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lab.models.generate import generate

    model = gpt("gpt_small").model.clone(**({} if TINY else {"context": 1024}))
    length, new = (16, 4) if TINY else (512, 65)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(tokens.shape, jnp.int32), train=False))
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape, jnp.bfloat16), shapes["params"])
    for rows in (1, 2) if TINY else (1, 32, 256):
        prompts = np.random.default_rng(0).integers(0, model.vocab, (rows, length)).astype(np.int32)
        lengths, seconds = np.full(rows, length, np.int32), {}
        for count in (1, new):
            each = jax.random.split(jax.random.key(1), rows)
            run = functools.partial(generate, model, params, prompts, lengths, each, new_tokens=count,
                                    temperature=0.8, top_k=50)
            jax.block_until_ready(run())  # compiled
            seconds[count] = min(timed(lambda run=run: jax.block_until_ready(run())) for _ in range(3))
        decode = (seconds[new] - seconds[1]) / (new - 1)
        found(f"batch {rows}", prefill_tokens_per_second=rows * length / seconds[1],
              decode_tokens_per_second=rows / decode, ms_per_token=1000 * decode)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def all_steps() -> Iterator[Callable[[], None]]:
    """In the order of run.py."""
    yield from (devices, prepare, checks, gpt_small, kernels, gpt_medium, torch, main_job, fashion, sampling, images,
                studies)


if __name__ == "__main__":
    SCRATCH.mkdir(parents=True, exist_ok=True)
    step = {step.__name__: step for step in all_steps()}.get(sys.argv[1], functools.partial(compile_job, *sys.argv[2:]))
    if step not in (prepare, checks, torch, studies, main_job):  # which start processes of their own
        from lab.parallel.backend import start_jax

        start_jax()
    step()
