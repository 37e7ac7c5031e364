"""`--slurm` on a real SLURM with two nodes on this machine. Skipped where it is not installed: needs root and

    apt install slurm-wlm munge
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.launching import DISTRIBUTED, SBIN, free_port, run, start, wait_for

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """SLURM with two nodes on this machine, on ports and with a key of its own; the variables that lead to it."""
    missing = [p for p in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(p, path=SBIN)]
    if missing or os.getuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'no more programs'} (apt install slurm-wlm munge)")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    names = (host, f"{host}-b")    # process 0 is found by the name of its node, which must lead here
    nodes = "\n".join(f"NodeName={n} NodeHostname={n} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=8000"
                      for n in names)
    conf = folder / "slurm.conf"
    conf.write_text(CONFIGURATION.format(host=host, folder=folder, port=free_port(), nodes=nodes))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environ = {"PATH": SBIN, "SLURM_CONF": str(conf)}
    daemons = [subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for words in (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
         f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"],
        ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name] for name in names))]

    def idle() -> bool:
        found = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environ, capture_output=True, text=True)
        return found.stdout.strip() == "2"

    try:
        wait_for(idle, 30, "both nodes being idle")
        yield environ
    finally:
        subprocess.run(["scancel", "--user=root"], env=environ, capture_output=True)
        limit = time.monotonic() + 20
        while subprocess.run(["squeue", "-h"], env=environ, capture_output=True).stdout and time.monotonic() < limit:
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(3)
            except subprocess.TimeoutExpired:
                daemon.kill()


TWO = "--nodes=2 --time=5 --comment='two words'"


def test_slurm_runs_on_two_nodes_and_returns_the_status(checkout, environ, slurm):
    done = run(checkout, environ | slurm, "--slurm", TWO, "experiments/tiny.py", "--note", "two words, $HOME",
               "--run-dir", "runs/two nodes")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 arguments ['experiments/tiny.py', '--note', 'two words, $HOME'," in done.stdout
    assert "is submitted" in done.stderr and "completed, exit status 0" in done.stderr
    kept = sorted(p.name for p in (checkout / "runs/two nodes/launch").iterdir())
    assert kept[0].startswith("slurm-") and kept[1] == "slurm.sh"


def test_slurm_a_failing_process_decides_the_status(checkout, environ, slurm):
    done = run(checkout, environ | slurm, "--slurm", TWO, "experiments/tiny.py", "--fail")
    assert done.returncode == 7 and "failed, exit status 7" in done.stderr, (done.stdout, done.stderr)


def test_slurm_a_process_that_outlives_a_failed_one_is_killed(checkout, environ, slurm):
    began = time.monotonic()
    done = run(checkout, environ | slurm | {"SLURM_WAIT": "2"}, "--slurm", TWO, "experiments/tiny.py", "--fail",
               "--hang")
    assert done.returncode == 137 and "failed" in done.stderr, (done.stdout, done.stderr)
    assert time.monotonic() - began < 60, "it would sleep for 120 s"


def test_slurm_queues_a_preempted_job_again(checkout, environ, slurm):
    process = start(checkout, environ | slurm, "--slurm", TWO, "experiments/tiny.py", "--hang", "--run-dir", "runs/p")
    folder = checkout / "runs/p"
    wait_for(lambda: len(list(folder.glob("up-*"))) == 2, 30, "the start of both processes")
    number = next((folder / "launch").glob("slurm-*.log")).stem.removeprefix("slurm-")
    subprocess.run(["scancel", "--signal=TERM", number], env=slurm, check=True)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, (out, err)
    assert "goes back into the queue" in out and "completed, exit status 0" in err
    for rank in (0, 1):
        assert f"saved {rank}" in out and f"rank {rank} of 2" in out
    assert out.count("restored") == 2 and out.count("fresh") == 2


def test_slurm_ctrl_c_stops_following_and_not_the_job(checkout, environ, slurm):
    process = start(checkout, environ | slurm, "--slurm", TWO, "experiments/tiny.py", "--hang", "--run-dir", "runs/c")
    folder = checkout / "runs/c"
    wait_for(lambda: len(list(folder.glob("up-*"))) == 2, 30, "the start of both processes")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "continues" in err and "scancel" in err
    number = err.rpartition("scancel ")[2].strip()
    state = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], env=slurm, capture_output=True, text=True)
    assert state.stdout.strip() == "RUNNING"
    subprocess.run(["scancel", number], env=slurm, check=True)


def test_slurm_a_study_is_an_array_of_workers(checkout, environ, slurm):
    """Two workers on two nodes share four cells: each runs once."""
    done = run(checkout, environ | slurm | {"STAND_IN": ""}, "--slurm", "--nodes=2", "experiments/tiny.py", "--vary",
               "batch=16", "--seeds", "2", "--execution", "loop")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted((checkout / "runs").glob("tiny-*/launch/slurm-*_[01].log"))
    ran = [line.partition(":")[0] for log in logs for line in log.read_text().splitlines() if " seed " in line]
    assert len(logs) == 2 and sorted(n for n in ran if n.startswith(("base seed", "batch=16 seed"))) == [
        "base seed 0", "base seed 1", "batch=16 seed 0", "batch=16 seed 1"], done.stdout
    assert len(list((checkout / "studies").glob("*/report.html"))) == 1


def test_slurm_says_what_sbatch_refuses(checkout, environ, slurm):
    done = run(checkout, environ | slurm, "--slurm", "--nodes=2 --partition=none", "experiments/tiny.py")
    assert done.returncode == 2 and "partition" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not DISTRIBUTED, reason="the code knows one process only")
def test_slurm_preempted_training_goes_on(checkout, environ, slurm):
    """SIGTERM to two processes that train: both save, the job is queued and starts again."""
    process = start(checkout, environ | slurm | {"STAND_IN": ""}, "--slurm", "--nodes=2", "experiments/tiny.py",
                    "--steps", "100000", "--checkpoint.every", "100000", "--evaluate.every", "100000",
                    "--run-dir", "runs/long")
    folder = checkout / "runs/long"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, 120, "training")
    number = next(folder.glob("launch/slurm-*.log")).stem.removeprefix("slurm-")
    subprocess.run(["scancel", "--signal=TERM", number], env=slurm, check=True)
    log = folder / f"launch/slurm-{number}.log"
    wait_for(lambda: "goes back into the queue" in log.read_text(), 60, "the saving")
    wait_for(lambda: len(list(folder.glob("environment*.json"))) == 2, 90, "the second start")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    subprocess.run(["scancel", number], env=slurm, check=True)
    assert list((folder / "checkpoints").glob("[0-9]*")), out


def test_slurm_trains(checkout, environ, slurm):
    """Real training: on two nodes where the code knows several processes, else on one."""
    nodes = "--nodes=2" if DISTRIBUTED else "--nodes=1"
    done = run(checkout, environ | slurm | {"STAND_IN": ""}, "--slurm", nodes, "experiments/tiny.py", "--run-dir",
               "runs/real")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "runs/real/result.json").exists()
