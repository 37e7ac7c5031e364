"""`--tpu NAME`: runs on all workers of a Cloud TPU VM (v2 to v6e) through gcloud; --create requests the VM first.

Processes are detached from the ssh connection: losing it only stops the log, and repeating the command follows it
again. With --create a preempted VM is requested again, and the run resumes from the checkpoints in its bucket, with a
new run folder. The run folder is copied back from worker 0 at the end.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.errors import UserError
from lab.files import replace_file
from lab.launch.job import PREPARE, Job, commit, exports, pack, say, show, split, tool
from lab.parallel.shared_secret import new_secret

if TYPE_CHECKING:
    from lab.launch.options import Options

PAUSE = float(os.environ.get("LAB_POLL_SECONDS", "20"))    # seconds between polls
PATIENCE = 600.0    # seconds that a VM reported as ready may stay unreachable
HOW = "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then run gcloud auth login."
# TPU generation -> (its name in an accelerator type, software image), from Google's documentation.
IMAGES = {"v2": ("v2", "tpu-ubuntu2204-base"), "v3": ("v3", "tpu-ubuntu2204-base"),
          "v4": ("v4", "tpu-ubuntu2204-base"), "v5e": ("v5litepod", "v2-alpha-tpuv5-lite"),
          "v5p": ("v5p", "v2-alpha-tpuv5"), "v6e": ("v6e", "v2-alpha-tpuv6e")}

# The firewall rule of Google's multislice guide blocks JAX's default port, 8482. SIGTERM goes to the whole session; the
# script survives it to record the exit status.
START = """\
#!/bin/bash
# Written by ./launch.sh --tpu: every worker runs it in its copy of the checkout.
trap : TERM
export PATH="$HOME/.local/bin:$PATH" LAB_ENVS="$HOME/.cache/lab/venvs" LAB_COMMIT={commit}
export PYTHONUNBUFFERED=1 JAX_COORDINATOR_PORT=8476 LAB_SECRET=$(cat launch/secret)
{exports}{command}
echo $? >launch/status
"""


@dataclass(frozen=True)
class Pod:
    """A TPU VM; its methods build gcloud commands. `ssh_flags`: for gcloud's ssh and scp."""

    name: str
    zone: str = ""
    ssh_flags: tuple[str, ...] = ()

    def _command(self, *words: str) -> list[str]:
        return ["gcloud", "--quiet", "compute", "tpus", *words, *([f"--zone={self.zone}"] if self.zone else [])]

    def describe(self) -> list[str]:
        """Prints the VM as JSON."""
        return self._command("tpu-vm", "describe", self.name, "--format=json")

    def request(self, kind: str, spot: bool) -> list[str]:
        """Requests the VM as a queued resource of the same name. Raises UserError for an unknown TPU type."""
        accelerator, image = accelerator_type(kind)
        return self._command("queued-resources", "create", self.name, f"--node-id={self.name}",
                             f"--accelerator-type={accelerator}", f"--runtime-version={image}",
                             *(["--spot"] if spot else []))

    def request_state(self) -> list[str]:
        """Prints the state of the request, such as WAITING_FOR_RESOURCES or ACTIVE."""
        return self._command("queued-resources", "describe", self.name, "--format=value(state.state)")

    def delete(self) -> list[str]:
        """Deletes the request and the VM."""
        return self._command("queued-resources", "delete", self.name, "--force")

    def ssh(self, worker: str, command: str) -> list[str]:
        """Runs a command on one worker, or on all (`all`)."""
        return self._command("tpu-vm", "ssh", self.name, f"--worker={worker}", *self.ssh_flags, f"--command={command}")

    def scp(self, worker: str, *paths: str) -> list[str]:
        """Copies files; the last path is the target."""
        return self._command("tpu-vm", "scp", *paths, f"--worker={worker}", *self.ssh_flags)


def accelerator_type(kind: str) -> tuple[str, str]:
    """("v5litepod-16", its software image) for "v5e-16". Raises UserError for an unknown TPU type."""
    generation, _, size = kind.replace("v5litepod", "v5e").partition("-")
    if generation.startswith(("tpu7", "v7")):
        raise UserError(f"--create {kind}: the Cloud TPU API does not offer TPU7x. Use Google's Cluster Toolkit "
                        f"(gcluster job submit) on a GKE cluster; lab/launch/README.md says how.")
    if generation not in IMAGES or not size.isdigit():
        raise UserError(f"--create {kind} is not a TPU type. The types are {', '.join(f'{g}-N' for g in IMAGES)}, "
                        f"such as v5e-16.")
    accelerator, image = IMAGES[generation]
    return f"{accelerator}-{size}", image


def home(job: Job) -> str:
    """The checkout's folder on a worker, relative to the home folder."""
    return f".cache/lab/checkouts/{job.name}"


def unpack(job: Job) -> str:
    """The command that sets up a worker once it has the archive."""
    return (f"mkdir -p {home(job)} && cd {home(job)} && tar -xzf ~/{job.name}.tar.gz && rm ~/{job.name}.tar.gz && "
            f'export LAB_ENVS="$HOME/.cache/lab/venvs" && {{ {exports(job, "; ")}{PREPARE} }}')


def script(job: Job) -> str:
    """The script that every worker runs in its checkout."""
    return START.format(commit=commit(), exports=exports(job), command=shlex.join(["./launch.sh", *job.elsewhere()]))


def begin(job: Job) -> str:
    """The command that starts the script detached on a worker; output and status go to files."""
    return (f"cd {home(job)} && rm -f launch/status && "
            "{ setsid nohup bash launch/start.sh >launch/log 2>&1 </dev/null & echo $! >launch/pid; }")


def stop(job: Job) -> str:
    """The command that makes a worker's process save and exit."""
    return f"kill -TERM -- -$(cat {home(job)}/launch/pid)"


def tail(job: Job, line: int) -> str:
    """The command that prints worker 0's output from a line on, until its process ends."""
    return f"cd {home(job)}/launch && tail -n +{line} -F --pid=$(cat pid) log 2>/dev/null"


def state(job: Job) -> str:
    """The command that prints `lab:` and worker 0's state: exit status, `running`, `killed` or `none` (not started)."""
    return (f"cd {home(job)}/launch 2>/dev/null || {{ echo lab:none; exit; }}; if [ -s status ]; then "
            'echo lab:$(cat status); elif kill -0 $(cat pid) 2>/dev/null; then echo lab:running; '
            "else echo lab:killed; fi")


def launch(options: Options, job: Job) -> int:
    """Requests the VM, copies files, sets up, starts and follows; restarts after status 75 or preemption."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", options.tpu):
        raise UserError(f"--tpu {options.tpu!r} is not the name of a TPU VM: lower-case letters, digits and hyphens.")
    pod = Pod(options.tpu, options.zone, tuple(split(options.gcloud_flags, "--gcloud-flags")))
    job.elsewhere()
    check_bucket(options, job)
    if options.dry_run:
        dry_run(options, pod, job)
        return 0
    tool("gcloud", HOW)
    while True:
        found = ready(options, pod)
        check_bucket(options, job, workers=len(found.get("networkEndpoints", [])) or 1)
        doing = ask(pod, job)
        if doing == "running":
            say(f"it runs on {pod.name} already.")
        else:
            if doing != "75":  # after 75 the workers are set up
                setup(pod, job)
            must(pod.ssh("all", begin(job)), "starting")
        if options.detach:
            say(f"started on {pod.name}; the same command without --detach follows it.")
            return 0
        status = follow(pod, job)
        if status is None and not options.create:
            say(f"{pod.name} was preempted. Create it again, then run the same command to resume.")
            return 75
        if status not in (75, None):
            break
        say("the run saved and stopped; starting it again." if status else f"{pod.name} was preempted.")
    job.local.parent.mkdir(parents=True, exist_ok=True)
    code, _, reason = capture(collect(pod, job))
    say(f"the run folder could not be fetched from worker 0: {reason}" if code else f"run folder: {job.local}")
    if options.create:
        say(f"{pod.name} is still there and costs money. Delete it: {shlex.join(pod.delete())}")
    return status


def collect(pod: Pod, job: Job) -> list[str]:
    """The command that copies the run folder from worker 0."""
    path = job.run_dir if job.run_dir.startswith("/") else f"{home(job)}/{job.run_dir}"
    return pod.scp("0", "--recurse", f"{pod.name}:{path}", str(job.local.parent))


def check_bucket(options: Options, job: Job, workers: int = 1) -> None:
    """Raises UserError if checkpoints need a bucket rather than a worker's local disk."""
    chips = options.create.rpartition("-")[2]
    if options.create:
        accelerator_type(options.create)
        workers = max(workers, 1 + int(int(chips) > 8))    # in every generation, up to 8 is one machine
    if job.bucket or not job.words[0].endswith(".py"):
        return
    if job.study and workers > 1:
        raise UserError(f"A study runs in one process at a time, and {options.tpu} has several workers: take a TPU of "
                        f"one, such as --create v5e-8.")
    if workers > 1:
        raise UserError(f"{options.tpu} has several workers, which share no disk, and checkpoints need one folder for "
                        f"all. {job.add_bucket}.")
    if options.spot and not (job.study and job.run_dir.startswith("/")):
        raise UserError(f"A spot VM loses its disk when it is preempted. {job.add_bucket}.")


def dry_run(options: Options, pod: Pod, job: Job) -> None:
    """Prints the script and the commands in order."""
    print(f"# {job.folder / 'start.sh'}\n{script(job)}")
    show(pod.describe())
    if options.create:
        print("# where there is no such VM; the second until it says ACTIVE:")
        show(pod.request(options.create, options.spot), pod.request_state())
    print("# where the run is not there already:")
    show(pod.ssh("0", state(job)), pod.scp("all", str(job.folder / "checkout.tar.gz"), f"{pod.name}:{job.name}.tar.gz"),
         pod.ssh("all", unpack(job)), pod.ssh("all", begin(job)))
    print("# follow worker 0; after status 75 start again:")
    show(pod.ssh("0", tail(job, 1)), pod.ssh("0", state(job)))
    if options.create:
        print("# where the VM was preempted, before it is requested again:")
        show(pod.delete())
    print("# at the end:")
    show(collect(pod, job))


def capture(command: list[str]) -> tuple[int, str, str]:
    """Runs a command: exit status, output, and gcloud's error message."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("#####")]
    lines = lines or [f"status {done.returncode}"]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return done.returncode, done.stdout, errors[-1].removeprefix("ERROR: ")


def must(command: list[str], doing: str) -> None:
    """Runs a command. Raises UserError with gcloud's error message if it fails."""
    code, _, reason = capture(command)
    if code:
        raise UserError(f"{doing[0].upper()}{doing[1:]} failed: {reason}")


def look(pod: Pod) -> dict:
    """The API's description of the VM; empty if there is none. Raises UserError if the API call fails."""
    code, text, reason = capture(pod.describe())
    if code == 0:
        return json.loads(text)
    if "NOT_FOUND" in reason or "not found" in reason.lower():
        return {}
    raise UserError(f"gcloud cannot say whether there is a TPU VM {pod.name}: {reason}")


def ready(options: Options, pod: Pod) -> dict:
    """Waits for the VM to be ready and returns its description; with --create, requests it first.

    Raises:
      UserError: the VM does not exist, or the request failed.
    """
    told = ""
    while (found := look(pod)).get("state") != "READY":
        if not options.create:
            what = f"is {found['state'].lower()}" if found else "does not exist"
            raise UserError(f"The TPU VM {pod.name} {what}. Give its --zone, or create it with --create v5e-16.")
        code, text, _ = capture(pod.request_state())
        asked = text.strip() if code == 0 else ""
        if asked == "FAILED":
            raise UserError(f"The request for {pod.name} failed; see gcloud compute tpus queued-resources describe "
                            f"{pod.name}, and delete it before the next try: {shlex.join(pod.delete())}")
        if asked == "SUSPENDED" or (asked == "ACTIVE" and found.get("state") in (None, "PREEMPTED", "TERMINATED")):
            must(pod.delete(), f"deleting what is left of {pod.name}")
        elif not asked:
            say(f"requesting {pod.name} ({options.create}{', spot' if options.spot else ''}).")
            must(pod.request(options.create, options.spot), f"requesting {pod.name}")
        if asked and asked != told:
            say(f"{pod.name}: {asked.lower().replace('_', ' ')}")
            told = asked
        time.sleep(PAUSE)
    return found


def setup(pod: Pod, job: Job) -> None:
    """Copies the tracked files to all workers and builds the environment there."""
    say(f"copying the tracked files to all workers of {pod.name}, and building the environment there (once).")
    job.make_folder()
    replace_file(job.folder / "start.sh", script(job))
    secret = job.folder / "secret"
    secret.unlink(missing_ok=True)
    with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(new_secret())
    must(pod.scp("all", str(pack(job, "start.sh", "secret")), f"{pod.name}:{job.name}.tar.gz"), "copying the files")
    must(pod.ssh("all", unpack(job)), "setting up")


def ask(pod: Pod, job: Job) -> str:
    """Worker 0's state, see `state`; empty if it is gone or unreachable for PATIENCE seconds."""
    limit, told = time.monotonic() + PATIENCE, ""
    while True:
        _, text, reason = capture(pod.ssh("0", state(job)))
        if found := re.search(r"^lab:(\w+)$", text, re.MULTILINE):
            return found[1]
        if look(pod).get("state") != "READY":
            return ""
        if time.monotonic() > limit:
            raise UserError(f"Worker 0 of {pod.name} cannot be reached by ssh: {reason}")
        if reason != told:
            say(f"worker 0 of {pod.name} cannot be reached, trying for {PATIENCE / 60:g} minutes: {reason}")
            told = reason
        time.sleep(PAUSE)


def follow(pod: Pod, job: Job) -> int | None:
    """Streams worker 0's output; returns its exit status, or None once the VM is gone.

    Raises:
      KeyboardInterrupt: after Ctrl-C, which stops following but not the run; prints a note.
    """
    lines = 0
    try:
        while True:
            command = pod.ssh("0", tail(job, lines + 1))
            with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                  start_new_session=True) as process:
                try:
                    for line in process.stdout:
                        sys.stdout.buffer.write(line)
                        sys.stdout.flush()
                        lines += line.endswith(b"\n")
                finally:
                    process.terminate()
            doing = ask(pod, job)
            if doing == "killed":
                return 137
            if doing != "running":
                return int(doing) if doing else None
            say("the connection was lost; following again.")
            time.sleep(min(PAUSE, 5))
    except KeyboardInterrupt:
        say(f"stopped following; the run continues. The same command follows it again. End it: "
            f"{shlex.join(pod.ssh('all', stop(job)))}")
        raise
