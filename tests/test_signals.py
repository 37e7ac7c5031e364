"""Signals, in processes of a few lines: what is said, when, and with which status they end, wherever they are."""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lab.signals import EXIT, HEARD
from tests.conftest import ROOT
from tests.launching import children_hear

START = """
    import sys, time
    from lab import signals
    signals.listen()
    class Alone:
        def stopping(self, wanted):
            return wanted
    def forever():
        print("here", flush=True)
        while True:
            time.sleep(60)
"""
LOOP = """
    stop = signals.Stop(Alone())
    with stop.listening():
        print("here", flush=True)
        while not stop():
            time.sleep(0.01)
        print("saved", flush=True)
        sys.exit(signals.done(signals.EXIT[stop.signal]))
"""


def start(body: str, ignored: tuple[int, ...] = (), held: bool = False) -> subprocess.Popen:
    """A Python process of these lines. `ignored`: signals that whoever started it ignores; `held`: as by launch.sh."""
    code = textwrap.dedent(START) + textwrap.dedent(body)
    with children_hear(ignored, held):
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    return process.returncode, out, err


def here(process: subprocess.Popen) -> subprocess.Popen:
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize("number", HEARD)
@pytest.mark.parametrize("ignored", [(), (signal.SIGINT,)], ids=["", "started in the background"])
def test_with_nothing_to_save_it_ends_at_once(number, ignored):
    process = here(start("forever()", ignored))
    process.send_signal(number)
    assert end(process) == (EXIT[number], "", f"{signal.Signals(number).name}: stopped; nothing had to be saved.\n")


@pytest.mark.parametrize("number", HEARD)
def test_in_the_loop_it_stops_after_the_step(number):
    process = here(start(LOOP, (signal.SIGINT,)))
    process.send_signal(number)
    status, out, err = end(process)
    assert (status, out) == (EXIT[number], "saved\n")
    assert err == f"{signal.Signals(number).name}: stopping after this step; again to stop at once.\n"


@pytest.mark.parametrize("first, second, ends", [
    (signal.SIGINT, signal.SIGINT, True), (signal.SIGTERM, signal.SIGTERM, True), (signal.SIGTERM, signal.SIGINT, True),
    (signal.SIGHUP, signal.SIGHUP, False), (signal.SIGINT, signal.SIGUSR1, False)])
def test_a_second_one(first, second, ends):
    """While the main thread is somewhere that never comes back to Python, as in a long compilation."""
    process = here(start("""
        import ctypes
        with signals.Stop(Alone()).listening():
            print("here", flush=True)
            for _ in range(40):
                ctypes.CDLL(None).usleep(100_000)
        print("went on", flush=True)
        sys.exit(signals.done(0))
    """))
    process.send_signal(first)
    assert "stopping after this step; again to stop at once" in process.stderr.readline()
    time.sleep(0.4)
    process.send_signal(second)
    begin = time.monotonic()
    status, out, err = end(process)
    name = signal.Signals(second).name
    if ends:
        assert (status, out) == (EXIT[second], "") and time.monotonic() - begin < 2
        assert err == f"{name} again: stopped at once. Run the same command to resume from the last checkpoint.\n"
    else:  # a closed terminal and a cluster's warning come twice by themselves
        assert (status, out, err) == (0, "went on\n", "")


def test_one_signal_that_is_sent_twice_is_one():
    """`timeout` sends to a process and to its group."""
    process = here(start(LOOP))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert end(process)[:2] == (75, "saved\n")


def test_signals_that_come_while_python_starts():
    """The launcher holds them back: none is lost, and none ends in a traceback."""
    for delay in (0, 0.01, 0.03):
        process = start("time.sleep(30)", held=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert end(process) == (130, "", "SIGINT: stopped; nothing had to be saved.\n")


@pytest.mark.parametrize("limits", [(2, 30), (3, 3)], ids=["ulimit -St", "ulimit -t"])
def test_the_limit_on_processor_time_leaves_time_to_save(limits):
    """Where both limits are one, the kernel would kill without a warning."""
    code = textwrap.dedent(START) + textwrap.dedent(LOOP.replace("time.sleep(0.01)", "sum(range(10_000))"))
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_CPU, limits)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=limit)
    assert end(process) == (75, "here\nsaved\n", "SIGXCPU: stopping after this step; again to stop at once.\n")


def test_nohup():
    process = here(start(LOOP, (signal.SIGHUP,)))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


def test_when_all_is_done_no_signal_changes_the_status():
    process = here(start("""
        import atexit
        atexit.register(forever)  # a library that takes its time
        sys.exit(signals.done(3))
    """))
    process.send_signal(signal.SIGTERM)
    assert end(process) == (3, "", "")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind processes to cores")
@pytest.mark.parametrize("worker, said", [(True, ""), (False, "SIGTERM: stopped; nothing had to be saved.\n")])
def test_a_worker_of_a_study_leaves_the_line_to_it(monkeypatch, worker, said):
    if worker:
        monkeypatch.setenv("LAB_STUDY_CORE", str(min(os.sched_getaffinity(0))))
    process = here(start("""
        import lab.commands.report, runpy
        signals.release()
        lab.commands.report.main = lambda args: forever()
        sys.argv = ["lab", "report"]
        runpy.run_module("lab", run_name="__main__", alter_sys=True)
    """))
    process.send_signal(signal.SIGTERM)
    assert end(process) == (75, "", said)


def test_a_forked_child_does_not_speak_for_its_parent():
    process = here(start("""
        import os
        if (child := os.fork()) == 0:
            time.sleep(10)
            os._exit(1)
        time.sleep(0.3)
        os.kill(child, 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -2
        forever()
    """))
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


@pytest.mark.parametrize("body, status, saved", [(LOOP, 141, True), ("forever()", 75, False)])
def test_nobody_reads(body, status, saved):
    """`| head -1`: the loop saves and stops; any other command ends when it writes."""
    process = here(start(body.replace("time.sleep(0.01)", "time.sleep(0.01); print('step', flush=True)")))
    process.stdout.close()
    if not saved:
        process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    err = process.stderr.read()
    assert process.returncode == status and "Traceback" not in err
    assert ("Nobody reads the output any more: stopping after this step." in err) == saved


def test_a_command_whose_reader_has_gone_ends():
    process = here(start("""
        print("here", flush=True)
        while True:
            print("line", flush=True)
            time.sleep(0.01)
    """))
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == ""


def test_streams_are_utf8_whatever_the_locale():
    env = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    body = "print('\\u2713 \\U0001f600 \\udcff'); print('\\u2713', file=sys.stderr)"
    code = textwrap.dedent(START) + body
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, timeout=30)
    assert (done.stdout, done.stderr) == ("\u2713 \U0001f600 \\udcff\n".encode(), "\u2713\n".encode())
    plain = subprocess.run([sys.executable, "-c", f"import sys; {body}"], env=env, capture_output=True, timeout=30)
    assert plain.returncode == 1 and b"UnicodeEncodeError" in plain.stderr  # the negative control


def test_a_full_disk_behind_the_output_is_named():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        code = textwrap.dedent(START) + "try:\n  print('x', flush=True)\nexcept OSError as e:\n  sys.exit(e.filename)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert re.search(r"the output \(.*stdout.*\)", done.stderr)
