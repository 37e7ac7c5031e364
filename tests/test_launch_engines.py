"""Launching for real: SLURM, and Open MPI over ssh to two hosts, on this machine. Skipped where they are not installed.

Debian: apt install slurm-wlm munge openmpi-bin openssh-server openssh-client iproute2. All as root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

DISTRIBUTED = (ROOT / "lab/distributed.py").exists()
# `python -m lab` without training: prints its role and arguments; on SIGTERM "saves" and exits 75; goes on afterwards.
STAND_IN = '''
import os, pathlib, signal, sys, time
rank = os.environ.get("SLURM_PROCID") or os.environ.get("LAB_PROCESS_ID")
words = sys.argv[sys.argv.index("lab") + 1:]
folder = pathlib.Path(words[words.index("--run-dir") + 1])
saved = folder / f"saved-{rank}"
def save(*_):
    saved.touch()
    time.sleep(2 * float(rank))    # processes never end at the same moment
    print("saved", rank, flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
print("rank", rank, "of", os.environ.get("SLURM_NTASKS") or os.environ.get("LAB_PROCESSES"), "arguments", words,
      "restored" if saved.exists() else "fresh", os.environ.get("LAB_COORDINATOR", ""), flush=True)
folder.mkdir(parents=True, exist_ok=True)
(folder / f"ran-{rank}").touch()
if "--fail" in words and rank == "1":
    os._exit(7)
if "--hang" in words and not saved.exists():
    (folder / f"up-{rank}").touch()
    time.sleep(120)
'''
# Stands for uv, so that nothing is downloaded: the environment it makes is the Python that runs the tests.
UV = """#!/bin/sh
if [ "$1" = venv ]; then
  for folder; do :; done
  mkdir -p "$folder/bin"
  cp "$(dirname "$0")/python" "$folder/bin/python"
fi
"""
PYTHON = """#!/bin/sh
case " $* " in
  *" -m lab "*) if [ -n "$STAND_IN" ]; then exec {python} {folder}/stand_in.py "$@"; fi ;;
esac
exec {python} "$@"
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout of the tracked files, in a folder with a space, and one tiny experiment."""
    parts = tmp_path_factory.mktemp("launch")
    folder = parts / "my checkout"
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True,
                            text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "corpus.txt").write_text("the pure function of a seed and a step " * 400)
    (folder / "experiments/tiny.py").write_text('''"""Tiny."""
from lab.data.sources import TextFiles
from lab.data.text import Text
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import AdamW
from lab.tasks.language import LanguageModel

experiment = Experiment(
    data=Text(TextFiles("corpus.txt"), Bytes(), length=16),
    model=GPT(depth=1, width=16, heads=2, vocab=256, context=16),
    task=LanguageModel(samples=0), optim=AdamW(lr=1e-2), steps=4, batch=8, evaluate=Evaluate(every=4, records=8),
    checkpoint=Checkpoint(every=2),
)
''')
    write_script(parts / "uv", UV)
    write_script(parts / "python", PYTHON.format(python=sys.executable, folder=parts))
    (parts / "stand_in.py").write_text(STAND_IN)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


@pytest.fixture
def environ(checkout: Path) -> dict[str, str]:
    """Variables for launch.sh; STAND_IN decides whether tasks train or only say what they are."""
    return {"PATH": os.environ["PATH"], "HOME": str(checkout.parent), "LAB_UV": str(checkout.parent / "uv"),
            "LAB_ACCELERATOR": "cpu", "PYTHON": sys.executable, "STAND_IN": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def start(checkout: Path, environ: dict[str, str], *words: str) -> subprocess.Popen:
    return subprocess.Popen([str(checkout / "launch.sh"), *words], cwd=checkout, env=environ, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def run(checkout: Path, environ: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    process = start(checkout, environ, *words)
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


# --- SLURM ------------------------------------------------------------------------------------------------------------

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
    names = ("localhost", host)    # both lead here: process 0 is found by the name of its node
    nodes = "\n".join(f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=8000"
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
        time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin"
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


def test_slurm_a_failing_process_ends_the_job_with_its_status(checkout, environ, slurm):
    began = time.monotonic()
    done = run(checkout, environ | slurm, "--slurm", TWO, "experiments/tiny.py", "--hang", "--fail")
    assert done.returncode == 7 and "failed, exit status 7" in done.stderr, (done.returncode, done.stderr, done.stdout)
    assert time.monotonic() - began < 60


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
    assert process.returncode == 130 and "goes on" in err and "scancel" in err
    number = err.rpartition("scancel ")[2].strip()
    state = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], env=slurm, capture_output=True, text=True)
    assert state.stdout.strip() == "RUNNING"
    subprocess.run(["scancel", number], env=slurm, check=True)


def test_slurm_says_what_sbatch_refuses(checkout, environ, slurm):
    done = run(checkout, environ | slurm, "--slurm", "--nodes=2 --partition=none", "experiments/tiny.py")
    assert done.returncode == 2 and "partition" in done.stderr and "Traceback" not in done.stderr


def test_slurm_trains(checkout, environ, slurm):
    """Real training: on two nodes where the code knows several processes, else on one."""
    nodes = "--nodes=2" if DISTRIBUTED else "--nodes=1"
    done = run(checkout, environ | slurm | {"STAND_IN": ""}, "--slurm", nodes, "experiments/tiny.py", "--run-dir",
               "runs/real")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "runs/real/result.json").exists()


# --- Open MPI over ssh to two hosts -----------------------------------------------------------------------------------

SSHD = """\
Port 22
ListenAddress 0.0.0.0
HostKey {folder}/hostkey
PidFile none
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
SetEnv LAB_UV="{parts}/uv" PYTHON="{python}" STAND_IN={stand_in} PATH="{path}"
"""
SUBNET = "10.213.77"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two network namespaces with an sshd each, called lab1 and lab2; `private`: they do not see the checkout."""

    def __init__(self, folder: Path, checkout: Path):
        self.folder, self.checkout, self.daemons = folder, checkout, []
        for name in ("id", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        entries = "".join(f"Host lab{i}\n  HostName {SUBNET}.{i}\n" for i in (1, 2))
        (folder / "config").write_text(entries + f"Host *\n  User root\n  IdentityFile {folder}/id\n  LogLevel ERROR\n"
                                       "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n")
        (folder / "bin").mkdir()
        write_script(folder / "bin/ssh", f"#!/bin/sh\nexec {shutil.which('ssh')} -F {folder}/config \"$@\"\n")
        ip("link", "add", "labbr", "type", "bridge")
        ip("addr", "add", f"{SUBNET}.254/24", "dev", "labbr")
        ip("link", "set", "labbr", "up")
        for i in (1, 2):
            etc = Path(f"/etc/netns/lab{i}")
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{SUBNET}.1 lab1\n{SUBNET}.2 lab2\n")
            ip("netns", "add", f"lab{i}")
            ip("link", "add", f"labv{i}", "type", "veth", "peer", "name", "eth0", "netns", f"lab{i}")
            ip("link", "set", f"labv{i}", "master", "labbr", "up")
            ip("-n", f"lab{i}", "addr", "add", f"{SUBNET}.{i}/24", "dev", "eth0")
            for name in ("lo", "eth0"):
                ip("-n", f"lab{i}", "link", "set", name, "up")

    def serve(self, stand_in: str = "1", private: bool = False) -> dict[str, str]:
        """Starts both sshd afresh; the variables with which `ssh lab1` works."""
        self.stop()
        Path("/run/sshd").mkdir(exist_ok=True)
        parts = self.checkout.parent
        (self.folder / "sshd.conf").write_text(SSHD.format(folder=self.folder, parts=parts, python=sys.executable,
                                                           stand_in=stand_in, path=SBIN))
        for i in (1, 2):
            home = self.folder / f"home{i}"
            home.mkdir(exist_ok=True)
            hide = f"mount -t tmpfs none '{self.checkout}' && mount --bind {home} /root &&" if private else ""
            self.daemons.append(subprocess.Popen(
                ["ip", "netns", "exec", f"lab{i}", "unshare", "--uts", "--mount", "bash", "-c",
                 f"hostname lab{i} && {hide} exec {shutil.which('sshd', path=SBIN)} -D -f {self.folder}/sshd.conf"]))
        environ = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "OMPI_MCA_oob_tcp_if_include": f"{SUBNET}.0/24"}
        for i in (1, 2):
            wait_for(lambda i=i: not subprocess.run([self.folder / "bin/ssh", f"lab{i}", "true"]).returncode, 20, "ssh")
        return environ

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait(10)
        self.daemons = []

    def remove(self) -> None:
        self.stop()
        for i in (1, 2):
            subprocess.run(["ip", "netns", "del", f"lab{i}"], capture_output=True)
            shutil.rmtree(f"/etc/netns/lab{i}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", "labbr"], capture_output=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Hosts]:
    missing = [p for p in ("mpirun", "sshd", "ssh-keygen", "ip", "unshare") if not shutil.which(p, path=SBIN)]
    if missing or os.getuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'no more programs'} (apt install openmpi-bin "
                    "openssh-server openssh-client iproute2)")
    allowed = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"network namespaces are not allowed here: {allowed.stderr.decode().strip()}")
    made = None
    try:
        made = Hosts(tmp_path_factory.mktemp("hosts"), checkout)
        yield made
    finally:
        if made:
            made.remove()


def test_hosts_on_a_shared_disk(checkout, environ, hosts):
    done = run(checkout, environ | hosts.serve(), "--hosts", "lab1,lab2", "experiments/tiny.py", "--note",
               "two words, $HOME", "--run-dir", "runs/two hosts")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 arguments ['experiments/tiny.py', '--note', 'two words, $HOME'," in done.stdout
    assert done.stdout.count(f"{SUBNET}.1:") == 2, "both know where process 0 is"


def test_hosts_a_failing_process_ends_the_others(checkout, environ, hosts):
    began = time.monotonic()
    done = run(checkout, environ | hosts.serve(), "--hosts", "lab1,lab2", "experiments/tiny.py", "--hang", "--fail")
    assert done.returncode == 7, done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_hosts_save_when_the_launcher_is_told_to_stop(checkout, environ, hosts, number, status):
    folder = checkout / f"runs/stop-{status}"
    process = start(checkout, environ | hosts.serve(), "--hosts", "lab1,lab2", "experiments/tiny.py", "--hang",
                    "--run-dir", f"runs/stop-{status}")
    wait_for(lambda: len(list(folder.glob("up-*"))) == 2, 60, "the start of both processes")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, (out, err)
    assert all((folder / f"saved-{rank}").exists() for rank in (0, 1))
    assert "save and stop" in err and "Traceback" not in err and "Primary job" not in err


def test_hosts_without_a_shared_disk_get_a_copy(checkout, environ, hosts):
    variables = environ | hosts.serve(private=True)
    done = run(checkout, variables, "--hosts", "lab1,lab2", "experiments/tiny.py")
    assert done.returncode == 2 and "do not all see" in done.stderr and "--run-dir" in done.stderr
    done = run(checkout, variables, "--hosts", "lab2", "experiments/tiny.py", "--run-dir", "runs/one copy")
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1" in done.stdout and "run folder: " in done.stderr
    assert (checkout / "runs/one copy/ran-0").exists(), "it ran where this folder cannot be seen, and was fetched"
    done = run(checkout, variables, "--hosts", "lab1,lab2", "experiments/tiny.py", "--run-dir", "gs://bucket/x")
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2 arguments ['experiments/tiny.py', '--run-dir', 'gs://bucket/x']" in done.stdout


def test_hosts_names_the_host_that_refuses(checkout, environ, hosts):
    variables = environ | hosts.serve()
    done = run(checkout, variables, "--hosts", f"lab1,{SUBNET}.254", "experiments/tiny.py")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"ssh to {SUBNET}.254 failed: " in done.stderr and "refused" in done.stderr


def test_hosts_train(checkout, environ, hosts):
    """Real training: on two hosts where the code knows several processes, else on one."""
    names = "lab1,lab2" if DISTRIBUTED else "lab1"
    done = run(checkout, environ | hosts.serve(stand_in=""), "--hosts", names, "experiments/tiny.py", "--run-dir",
               "runs/real hosts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "runs/real hosts/result.json").exists()
