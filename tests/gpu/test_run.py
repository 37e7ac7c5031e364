"""The script for a GPU, rehearsed on a CPU: every step, tiny; limits, repeated calls, and classes of kernels."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from lab.commands.bench import xla_options
from lab.errors import UserError
from tests.conftest import ROOT
from tests.gpu import run, steps
from tests.gpu.trace import classes_of, kernels_of


def rehearse(results, *words):
    environ = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has
    return subprocess.run([sys.executable, ROOT / "tests/gpu/run.py", "--rehearse", "--results", results, *words],
                          capture_output=True, text=True, cwd=ROOT, env=environ)


def test_some_steps_rehearse(tmp_path):
    """README.md has the command that rehearses all of them, for before a GPU is lent: six minutes of two cores."""
    results, some = tmp_path / "results.json", ("devices", "gpt_small", "kernels", "sampling")
    done = rehearse(results, "--only", ",".join(some))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    rows = json.loads(results.read_text())["steps"]
    assert [row["step"] for row in rows] == list(some)
    for row in rows:
        assert row["status"] == "done" and row["found"] and row["rehearsal"], row
    by_step = {row["step"]: row["found"] for row in rows}
    assert sum(found["ms_per_step"] > 0 for found in by_step["gpt_small"] if "ms_per_step" in found) == 2
    shares = {found["what"]: found["share"] for found in by_step["kernels"] if "share" in found}
    assert sum(shares.values()) == pytest.approx(1)
    assert {"class products", "class optimizer", "class loss"} <= set(shares)
    # A second call has nothing to do, also with the results given as those of an earlier call.
    again = rehearse(tmp_path / "new.json", "--before", results, "--only", ",".join(some))
    assert again.returncode == 0 and " ..." not in again.stdout and "sampling: done" in again.stdout
    assert rehearse(results, "--only", "nothing").returncode == 2


def test_the_steps_are_the_functions():
    assert [step.__name__ for step in steps.all_steps()] == [step.name for step in run.STEPS]


def test_a_step_that_takes_too_long_is_stopped_and_fails(capsys):
    row = run.run(run.Step("devices", 1), 0.2, run.environment(rehearse=True), rehearse=True)
    assert row["status"] == "stopped after 0 s" and row["seconds"] < 10


def event(pid, tid, name, dur, **args):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": dur, "args": args}


def test_kernels_are_counted_once_and_by_class(tmp_path):
    meta = [{"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}} for pid, tid, kind, name in (
        (1, 0, "process_name", "/device:GPU:0 NVIDIA"), (1, 7, "thread_name", "Stream #7(Compute)"),
        (1, 8, "thread_name", "XLA Ops"), (2, 0, "process_name", "/host:CPU"), (2, 1, "thread_name", "python"))]
    spans = [event(1, 7, "cudnn_generated_fort_native_sdpa_sm90_flash", 5.0, hlo_op="custom-call.1"),
             event(1, 7, "nvjet_hsh_128x256", 40.0, hlo_op="gemm.2"),
             event(1, 7, "loop_fusion_3", 7.0, hlo_op="loop_fusion.3"),
             event(1, 7, "input_reduce_fusion", 3.0, hlo_op="fusion.4"),
             event(1, 7, "MemcpyD2D", 1.0), event(1, 8, "loop_fusion.3", 100.0, hlo_op="loop_fusion.3"),
             event(2, 1, "python", 100.0)]
    (tmp_path / "plugins").mkdir()
    with gzip.open(tmp_path / "plugins/perfetto_trace.json.gz", "wt") as file:
        json.dump({"traceEvents": meta + spans}, file)
    program = '''
      %loop_fusion.3 = f32[8] fusion(%p), kind=kLoop, metadata={op_name="jit(update)/optimizer/add" stack_frame_id=1}
      ROOT %fusion.4 = f32[8] fusion(%p), metadata={op_name="jit(update)/jvp(GPT)/block_0/attention_norm/reduce_sum"}
    '''
    times = kernels_of(tmp_path)
    assert sum(times.values()) == 56
    assert dict(classes_of(times, program)) == {"attention": 5, "products": 40, "optimizer": 7, "norm": 3, "copies": 1}
    assert classes_of(times, "")["other"] == 10  # negative control: without the program's text


def test_options_of_xla_are_read_as_the_compiler_takes_them():
    assert xla_options(("a=true", "b=4", "c=", "d=x=y")) == {"a": True, "b": 4, "c": "", "d": "x=y"}
    with pytest.raises(UserError, match="NAME=VALUE"):
        xla_options(("a",))
