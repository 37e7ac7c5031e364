"""lab beside PyTorch: time per step, or of a whole run, of the same mathematics on the same batches.

    $(UV_TORCH_BACKEND=cpu LAB_EXTRAS=benchmark ./launch.sh env --python) tests/benchmarks/compare_torch.py --local
    PYTHON tests/benchmarks/compare_torch.py gpt_char --full --precision float32,bfloat16 --data.source.data-dir DIR
    PYTHON tests/benchmarks/compare_torch.py gpt_char --full --whole --rounds 2
    PYTHON tests/benchmarks/compare_torch.py gpt_small --full --device cuda --torch OTHER_PYTHON --batch 64 \\
        --grad-accum-steps 2 --timed-steps 20 --ways '{"optimizer": "fused", "attention": "sdpa"}'

PYTHON is the `$(...)` of the first line, which builds the environment
once (UV_TORCH_BACKEND=cpu: PyTorch without CUDA; leave it out where its own index cannot be reached). OTHER_PYTHON
needs PyTorch and NumPy only: builds of PyTorch and JAX for CUDA want different NVIDIA packages. First the names of
experiments (default: the six for a CPU), then options, then flags of the experiment, which hold for both sides.

Rounds alternate: lab, PyTorch's forms, lab, ...; each is a process of its own, because the speed of a machine drifts
and allocators, threads and caches must be each one's own. lab is `./launch.sh bench`; PyTorch is torch_train.py on what
torch_job.py took from the experiment, in the fastest of equal ways, found beforehand: "stock" is eager as a user starts
it, "eager" and "compiled" have the settings of malloc that lab's launcher makes for lab.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.environment import variables  # noqa: E402 (this file is started as a script)

SEARCH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
NAMES = ("gpt_char", "mnist_cnn", "fashion_cnn", "newsgroups_lstm", "linear_regression", "logistic_regression")
WARM = 3  # calls that torch_train.py leaves out
FORMS = ("stock", "eager", "compiled")
MORE_FORMS = ("loader",)  # eager, and the batches come from a DataLoader; on request


class Stop(Exception):
    """What a person can fix, in a sentence or two."""


class Side(NamedTuple):
    """How the processes of one comparison are started."""

    torch: str
    device: str
    caches: Path


def parsed(arguments: Sequence[str]) -> tuple[list[str], argparse.Namespace, list[str]]:
    """(names of experiments, options, flags of the experiments)."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    parser = argparse.ArgumentParser(usage="compare_torch.py [NAME ...] --full|--local [options] [experiment flags]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    twin = parser.add_mutually_exclusive_group(required=True)
    twin.add_argument("--full", action="store_true", help="the real experiments")
    twin.add_argument("--local", action="store_true", help="their small twins, which need no data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timed-steps", type=int, default=50, help="steps timed in each process, after warm-up")
    parser.add_argument("--precision", default="", help="float32, bfloat16 or both with a comma; default: the "
                                                        "experiment's own")
    parser.add_argument("--forms", default=",".join(FORMS), help="forms of PyTorch")
    parser.add_argument("--ways", type=json.loads, default=None, metavar="JSON",
                        help='instead of finding the fastest: {"optimizer": "fused", "attention": "plain"}')
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="a Python that has PyTorch")
    parser.add_argument("--whole", action="store_true", help="the whole run, from start-up to its last evaluation")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    options, flags = parser.parse_known_args(arguments[first:])
    if options.rounds < 1 or options.timed_steps < 1:
        raise Stop("--rounds and --timed-steps must be at least 1.")
    if unknown := set(options.forms.split(",")) - {*FORMS, *MORE_FORMS}:
        raise Stop(f"--forms has no {', '.join(unknown)}: there are {', '.join([*FORMS, *MORE_FORMS])}.")
    return list(arguments[:first]) or list(NAMES), options, ["--full" if options.full else "--local", *flags]


def run(command: Sequence[str | Path], environ: Mapping[str, str] = {}) -> str:
    """stdout of a process; `environ` in addition to ours, without what the launcher sets for lab alone.

    Raises Stop with the end of its stderr when it fails.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([str(word) for word in command], env={**ours, **environ}, cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode:
        raise Stop(f"{shlex.join(map(str, command))} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def last_json(text: str) -> dict[str, Any]:
    """The object on the last line."""
    return json.loads(text.strip().splitlines()[-1])


def check_torch(python: str) -> None:
    """Raises Stop where this Python has no PyTorch."""
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode:
        raise Stop("This Python has no PyTorch. Use that of the benchmark extra: $(UV_TORCH_BACKEND=cpu "
                   "LAB_EXTRAS=benchmark ./launch.sh env --python) tests/benchmarks/compare_torch.py ...")


def file_of(name: str) -> str:
    """The file of an experiment that is named, or given by its path."""
    return name if name.endswith(".py") else f"experiments/{name}.py"


def make_job(folder: Path, updates: int | None, name: str, flags: Sequence[str]) -> dict[str, Any]:
    """Writes the job and returns its description."""
    print(f"{name} {shlex.join(flags)}: writing the batches ...", file=sys.stderr, flush=True)
    run([sys.executable, "-P", "-m", "tests.benchmarks.torch_job", folder, str(WARM), str(updates or "all"),
         file_of(name), *flags], {"PYTHONPATH": SEARCH, "JAX_PLATFORMS": "cpu", "LAB_PLATFORM": "cpu"})
    return json.loads((folder / "job.json").read_text())


def by_torch(side: Side, job: Path, form: str, ways: Mapping[str, str]) -> dict[str, Any]:
    """What torch_train.py says of one form."""
    environ = {"PYTHONPATH": SEARCH, "TORCHINDUCTOR_CACHE_DIR": str(side.caches / "inductor")}
    if "stock" not in form and side.device == "cpu":
        launched = variables.process_environ({}, "cpu")
        environ |= {name: value for name, value in launched.items() if name.startswith("MALLOC_")}
    return last_json(run([side.torch, "-P", "-m", "tests.benchmarks.torch_train", job, form.replace("stock", "eager"),
                          json.dumps(ways), side.device], environ))


def by_lab(side: Side, words: Sequence[str]) -> str:
    """stdout of a command of lab."""
    return run([ROOT / "launch.sh", *words], {"JAX_COMPILATION_CACHE_DIR": str(side.caches / "xla")})


def ways_of(side: Side, job: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The fastest ways for PyTorch, or those that were asked for."""
    if options.ways is not None:
        return {"ways": options.ways}
    found = by_torch(side, job, "tune", {})
    print(f"  fastest in PyTorch: {' '.join(found['ways'].values())}, of {found['ms']} ms", file=sys.stderr, flush=True)
    return found


def alternate(options: argparse.Namespace, measure: Any) -> dict[str, list[dict[str, Any]]]:
    """form -> what `measure(form, round)` says, in alternation: lab, then PyTorch's forms, and again."""
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in ("lab", *options.forms.split(","))}
    for i in range(options.rounds):
        for form in found:
            found[form].append(measure(form, i))
            told = ", ".join(f"{key} {value:.4g}" for key, value in found[form][-1].items()
                             if key in ("ms_per_step", "compile_seconds", "seconds", "loss", "mfu") and value)
            print(f"  round {i + 1}, {form}: {told}", file=sys.stderr, flush=True)
    return found


def ratios(found: Mapping[str, list[dict[str, Any]]], key: str) -> dict[str, Any]:
    """ours / best PyTorch, round by round: the best is the form with the least median."""
    best = min((form for form in found if form != "lab"), key=lambda form: median(r[key] for r in found[form]))
    each = [ours[key] / theirs[key] for ours, theirs in zip(found["lab"], found[best], strict=True)]
    return {"best": best, "ratio": median(each), "ratios": each}


def compare_updates(name: str, options: argparse.Namespace, flags: Sequence[str], side: Side) -> dict[str, Any]:
    """Time per step."""
    job = side.caches / "job"
    spec = make_job(job, options.timed_steps, name, flags)
    tuned = ways_of(side, job, options)

    def measure(form: str, _: int) -> dict[str, Any]:
        if form != "lab":
            return by_torch(side, job, form, tuned["ways"])
        return last_json(by_lab(side, ["bench", file_of(name), *flags, "--no-breakdown",
                                       "--timed-steps", str(options.timed_steps)]))

    found = alternate(options, measure)
    return {"experiment": name, "precision": spec["precision"], "flags": list(flags), "parameters": spec["parameters"],
            **ratios(found, "ms_per_step"), "tuned": tuned, "rounds": found}


def compare_whole(name: str, options: argparse.Namespace, flags: Sequence[str], side: Side) -> dict[str, Any]:
    """Seconds from the command to its end, each time with empty caches of compiled programs."""
    job = side.caches / "job"
    spec = make_job(job, None, name, flags)
    tuned = ways_of(side, job, options)

    def measure(form: str, i: int) -> dict[str, Any]:
        place = side._replace(caches=side.caches / f"{form}{i}")
        start = time.monotonic()
        if form == "lab":
            by_lab(place, [file_of(name), *flags, "--run-dir", str(place.caches / "run")])
            seconds = time.monotonic() - start
            result = json.loads((place.caches / "run/result.json").read_text())
            return {"seconds": seconds, "loss": result["final"]["loss"], "result": result}
        found = by_torch(place, job, f"whole-{form}", tuned["ways"])
        return {"seconds": time.monotonic() - start, **found}

    found = alternate(options, measure)
    return {"experiment": name, "precision": spec["precision"], "flags": list(flags), "steps": spec["steps"],
            **ratios(found, "seconds"), "tuned": tuned, "rounds": found}


def shown(values: Sequence[float], unit: str = "") -> str:
    """Median, and from least to greatest where there are several."""
    spread = f" ({min(values):.3g}-{max(values):.3g})" if len(values) > 1 else ""
    return f"{median(values):.3g}{unit}{spread}"


def table_of(rows: Sequence[Mapping[str, Any]], key: str, forms: Sequence[str]) -> Table:
    """What was found, for a person."""
    unit = "ms a step" if key == "ms_per_step" else "seconds"
    extra = "compilation, s" if key == "ms_per_step" else "final validation loss"
    columns = ["lab", *forms]
    table = Table(title=f"{unit}: median of rounds (least-greatest)")
    waits = any("data_wait_ms" in row["rounds"]["lab"][0] for row in rows)  # beside its time per step
    speeds = any("mfu" in row["rounds"][forms[0]][0] for row in rows)
    for head in ("experiment", "class", *columns, "lab / best", f"{extra}: {', '.join(columns)}",
                 *(["lab waits for data, ms"] if waits else []), *(["per second, MFU"] if speeds else [])):
        table.add_column(head)
    for row in rows:
        rounds = row["rounds"]
        if key == "ms_per_step":  # the first round has empty caches
            more = ", ".join(f"{rounds[form][0].get('compile_seconds', 0):.1f}" for form in columns)
        else:
            more = ", ".join(f"{median(r['loss'] for r in rounds[form]):.4f}" for form in columns)
        cells = [row["experiment"], row["precision"], *(shown([r[key] for r in rounds[form]]) for form in columns),
                 f"{shown(row['ratios'])} of {row['best']}", more]
        if waits:
            cells.append(shown([r.get("data_wait_ms", 0.0) for r in rounds["lab"]]))
        if speeds:
            cells.append("; ".join(speed(rounds[form]) for form in columns))
        table.add_row(*cells)
    return table


def speed(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Tokens (images, records) per second and MFU, medians."""
    name = next(name for name in rounds[0] if name.endswith("_per_second") and not name.startswith("flops"))
    mfu = [r["mfu"] for r in rounds if r.get("mfu")]
    return f"{median(r[name] for r in rounds):,.0f}" + (f", {median(mfu):.1%}" if mfu else "")


def main(arguments: Sequence[str]) -> None:
    """Compares, prints a table and one line of JSON."""
    names, options, flags = parsed(arguments)
    check_torch(options.torch)
    run([ROOT / "launch.sh", "env"])  # builds lab's environment, if there is none, before any clock
    rows = []
    key, compare = ("seconds", compare_whole) if options.whole else ("ms_per_step", compare_updates)
    with contextlib.suppress(KeyboardInterrupt):  # what is there already is shown
        for name, more in plans(names, options):
            with tempfile.TemporaryDirectory(prefix="lab-compare-") as folder:
                rows.append(compare(name, options, [*flags, *more], Side(options.torch, options.device, Path(folder))))
    if rows:
        Console(highlight=False, width=160).print(table_of(rows, key, options.forms.split(",")))
    print(json.dumps(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def plans(names: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Each name in each precision: (name, flags)."""
    for name in names:
        for precision in options.precision.split(","):
            yield name if "/" in name else Path(name).stem, ["--precision", precision] if precision else []


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Stop as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
