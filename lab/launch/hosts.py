"""`--hosts h1,h2`: Open MPI's mpirun starts one process per host over ssh and returns output and status here.

If all hosts see the run folder and this checkout at the same path (a shared disk), they are used in place. Otherwise
the tracked files are copied to each host, and several hosts need a bucket or a shared disk for checkpoints. At the end
the run folder is copied back from the first host.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import UserError
from lab.files import ROOT
from lab.launch.job import Job, commit, exports, pack, say, show, tool
from lab.parallel.shared_secret import new_secret

if TYPE_CHECKING:
    from lab.launch.options import Options

SECONDS = 10    # timeout per connection
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS}")
HOW = "install Open MPI here and on every host (Debian, Ubuntu: apt install openmpi-bin)."


def parse_hosts(text: str) -> list[str]:
    """["h1", "h2"] from "h1,h2". Raises UserError for an invalid or repeated host name."""
    hosts = [host.strip() for host in text.split(",")]
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*", host):
            raise UserError(f"--hosts {text!r}: {host!r} is not a host name. Write them as h1,h2 or user@h1,user@h2.")
    if len(set(hosts)) < len(hosts):
        raise UserError(f"--hosts {text} names a host twice; there is one process per host.")
    return hosts


def task(job: Job, folder: str, copied: bool, coordinator: str) -> str:
    """The bash command that each process runs; `folder` is already quoted."""
    words = job.elsewhere() if copied else job.words
    return (f"cd -- {folder} || exit 2\n{exports(job)}" +
            (f'export LAB_ENVS="$HOME/.cache/lab/venvs" LAB_COMMIT={commit()}\n' if copied else "") +
            f"export PYTHONUNBUFFERED=1 LAB_COORDINATOR={shlex.quote(coordinator)}\n"
            "export LAB_PROCESSES=$OMPI_COMM_WORLD_SIZE LAB_PROCESS_ID=$OMPI_COMM_WORLD_RANK\n"
            f"exec {'./launch.sh' if copied else shlex.quote(str(ROOT / 'launch.sh'))} {shlex.join(words)}")


def mpirun(hosts: list[str], text: str) -> list[str]:
    """The mpirun command. Disables binding: by default mpirun binds each process to one core, but JAX uses all."""
    return ["mpirun", "--quiet", "-x", "LAB_SECRET", "--bind-to", "none", "--mca", "plm_rsh_args", " ".join(SSH[1:]),
            "-np", str(len(hosts)), "-H", ",".join(f"{host}:1" for host in hosts), "bash", "-c", text]


def launch(options: Options, job: Job) -> int:
    """Copies files, sets up, starts and waits; returns mpirun's status, or 130 after Ctrl-C."""
    hosts = parse_hosts(options.hosts)
    if job.study and len(hosts) > 1:
        raise UserError("A study runs in one process at a time. Start the same command on every host instead: where "
                        "they share a disk, they share the cells.")
    home, setup = f".cache/lab/checkouts/{job.name}", f"{exports(job, '; ')}./launch.sh env"
    copy = f"mkdir -p {home} && tar -xzf - -C {home}"
    port = 20000 + int(job.name[-8:], 16) % 10000
    if options.dry_run:
        place, archive = shlex.quote(os.getcwd()), job.folder / "checkout.tar.gz"
        print("# Where the hosts see this checkout and the run folder:")
        show(*(ssh(host, f"cd {shlex.quote(str(ROOT))} && {{ {setup}; }}") for host in hosts))
        show(mpirun(hosts, task(job, place, False, f"{coordinator(hosts[0])}:{port}")))
        print("# Where they do not:")
        for host in hosts:
            print("+", shlex.join(ssh(host, copy)), "<", shlex.quote(str(archive)))
        show(*(ssh(host, _copied_setup(home, setup)) for host in hosts))
        show(mpirun(hosts, task(job, f'"$HOME"/{home}', True, f"{coordinator(hosts[0])}:{port}")))
        return 0
    tool("mpirun", HOW)
    tool("ssh", "install the OpenSSH client (Debian, Ubuntu: apt install openssh-client).")
    copied = not shared(hosts, job)
    if copied:
        if len(hosts) > 1 and not (job.bucket or Path(job.run_dir).is_absolute()):
            raise UserError(f"The hosts {', '.join(hosts)} do not all see {job.local}, and checkpoints need one folder "
                            f"for all. {job.add_bucket}, or --run-dir with an absolute path on a shared disk.")
        archive = pack(job)
        say(f"copying the tracked files to {', '.join(hosts)}:~/{home}")
        each(hosts, copy, archive)
        each(hosts, _copied_setup(home, setup))
    else:
        each(hosts, f"cd {shlex.quote(str(ROOT))} && {{ {setup}; }}")
    folder = f'"$HOME"/{home}' if copied else shlex.quote(os.getcwd())
    text = task(job, folder, copied, f"{coordinator(hosts[0])}:{port}")
    status = wait(mpirun(hosts, text))
    if copied and not Path(job.run_dir).is_absolute():
        collect(hosts[0], home, job)
    return status


def ssh(host: str, command: str) -> list[str]:
    """The ssh command line that runs `command` on a host, without a password prompt."""
    return [*SSH, host, command]


def _copied_setup(home: str, setup: str) -> str:
    return f'cd {home} && export LAB_ENVS="$HOME/.cache/lab/venvs" && {{ {setup}; }}'


def coordinator(host: str) -> str:
    """The address at which the other hosts reach this one: its name as resolved by ssh's configuration."""
    try:
        done = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return host.rpartition("@")[2]
    found = re.search(r"^hostname (\S+)$", done.stdout, re.MULTILINE)
    return found[1] if found else host.rpartition("@")[2]


def each(hosts: list[str], command: str, stdin: Path | None = None) -> list[str]:
    """Runs a command on all hosts in parallel; returns each host's output.

    Raises:
      UserError: a host is unreachable, or the command fails on it (names the host and the reason).
    """
    def one(host: str) -> str:
        with open(stdin or os.devnull, "rb") as file:
            done = subprocess.run(ssh(host, command), stdin=file, capture_output=True)
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1].strip()
        if done.returncode == 255:
            raise UserError(f"ssh to {host} failed: {last.rstrip('.')}. `ssh {host} true` must work without a "
                            f"password.")
        if done.returncode:
            raise UserError(f"On {host}: {last}")
        return done.stdout.decode(errors="replace")

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(one, hosts))


def shared(hosts: list[str], job: Job) -> bool:
    """Whether all hosts see the checkout and the run folder. Raises UserError if a host lacks Open MPI."""
    job.make_folder()
    token = job.folder / f"seen-{os.getpid()}"
    token.touch()
    try:
        answers = each(hosts, f"command -v orted >/dev/null || echo none; test -e {shlex.quote(str(token))} "
                              f"-a -e {shlex.quote(str(ROOT / 'launch.sh'))} && echo seen; true")
    finally:
        token.unlink()
    for host, answer in zip(hosts, answers, strict=True):
        if "none" in answer.split():
            raise UserError(f"{host} has no Open MPI (orted): {HOW}")
    return all("seen" in answer.split() for answer in answers)


def wait(command: list[str]) -> int:
    """Runs mpirun until it exits; returns its status, or 130 after Ctrl-C.

    On SIGINT or SIGTERM mpirun kills its processes after a second, before they have saved, but it forwards SIGUSR1.
    """
    environ = os.environ | {"LAB_SECRET": new_secret()}
    if os.getuid() == 0:
        environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        process.send_signal(signal.SIGTERM if got else signal.SIGUSR1)
        got.append(number)
        say("the processes save and stop; once more ends them at once." if len(got) == 1 else "ending them.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if signal.SIGINT in got and status == 75 else status if status >= 0 else 128 - status


def collect(host: str, home: str, job: Job) -> None:
    """Copies the run folder back from a host's checkout."""
    job.local.mkdir(parents=True, exist_ok=True)
    pull = subprocess.Popen(ssh(host, f"tar -czf - -C {shlex.quote(f'{home}/{job.run_dir}')} ."),
                            stdout=subprocess.PIPE)
    done = subprocess.run(["tar", "-xzf", "-", "-C", str(job.local)], stdin=pull.stdout)
    if pull.wait() or done.returncode:
        say(f"the run folder could not be fetched; it is on {host} in ~/{home}/{job.run_dir}")
    else:
        say(f"run folder: {job.local}")
