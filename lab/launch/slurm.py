"""`--slurm`: writes an sbatch script to the run folder, submits it, and follows its output until the job ends."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import UserError
from lab.files import ROOT, replace_file
from lab.launch.check import check_flags
from lab.launch.job import Job, exports, forwarded, say, show, split, tool

if TYPE_CHECKING:
    from lab.launch.options import Options

# Status 75 means saved: the job is requeued under the same job id and output file. SLURM_WAIT: seconds that processes
# may keep running after the first one exits; --kill-on-bad-exit=1 would signal them at once and turn their 75 or 2 into
# 143. `wait` is in a loop because a signal to the script interrupts it. SRUN_CPUS_PER_TASK is needed because srun does
# not inherit sbatch's --cpus-per-task.
SCRIPT = """\
#!/bin/bash
# Written by ./launch.sh --slurm; can be submitted again with sbatch.
#SBATCH --job-name={name}
#SBATCH --output="{log}"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
{tasks}{array}#SBATCH {options}
{exports}export LAB_SECRET="${{LAB_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')}}"
export PYTHONUNBUFFERED=1 SLURM_WAIT="${{SLURM_WAIT:-30}}"
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
cd -- {cwd} || exit 2
trap : TERM
srun --kill-on-bad-exit=0 {command} &
while :; do wait $!; status=$?; kill -0 $! 2>/dev/null || break; done
if [ $status = 75 ]; then
  echo "lab: saved; job $SLURM_JOB_ID goes back into the queue."
  scontrol requeue "$SLURM_JOB_ID" && sleep 300    # SLURM ends this script meanwhile
fi
exit $status
"""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE", "REVOKED", "SPECIAL_EXIT"}


def script(job: Job, options: str) -> str:
    """The text of the sbatch script.

    Raises:
      UserError: the options contain a line break or redirect the output.
    """
    if "\n" in options or "\r" in options:
        raise UserError("The options of --slurm hold a line break; put them on one line.")
    words, array = split(options, "--slurm"), ""
    if job.study:
        array, words = workers(words)
        options = shlex.join(words)
    if found := re.search(r"(^|\s)(-[oea]|--output|--error|--array)(?![a-z-])", options):
        raise UserError(f"{found[2]} does not go with --slurm: there is one job, and its output goes to the "
                        f"run folder.")
    asked = re.search(r"(^|\s)(-n|--ntasks|--gpus-per-task|--tasks-per-node)", options)
    log = str(job.folder).replace("%", "%%") + f"/slurm-{'%A_%a' if array else '%j'}.log"    # sbatch replaces %j
    return SCRIPT.format(
        name=job.name, log=log, options=options.strip() or "--nodes=1", cwd=shlex.quote(os.getcwd()),
        tasks="" if asked else "#SBATCH --ntasks-per-node=1\n", array=f"#SBATCH --array={array}\n" if array else "",
        exports=exports(job), command=shlex.join([str(ROOT / "launch.sh"), *job.words]),
    )  # fmt: skip


def workers(words: list[str]) -> tuple[str, list[str]]:
    """Converts sbatch options for a study to a job array of single-process workers: (array, other options).

    Each requested node or task becomes a worker, and the workers share the study's cells. A given --array is kept.

    Raises:
      UserError: a count is not a number.
    """
    array, number, rest, left = "", 1, [], list(words)
    names = {"-N": "nodes", "--nodes": "nodes", "-n": "tasks", "--ntasks": "tasks", "-a": "array", "--array": "array"}
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
        if flag not in names:
            rest.append(word)
            continue
        value = value if equals else left.pop(0) if left else ""
        if names[flag] == "array":
            array = value
        elif value.isdecimal() and int(value):
            number *= int(value)
        else:
            raise UserError(f"{flag} {value} in --slurm: a study has a worker for each node or task, so this must be a "
                            f"number.")
    return array or f"0-{number - 1}", ["--nodes=1", "--ntasks=1", *rest]


def test_only(text: str) -> str:
    """Checks the script with `sbatch --test-only`: "" if accepted, else why it could not be checked. Raises UserError
    if sbatch rejects it."""
    if shutil.which("sbatch") is None:
        return "sbatch is not on this machine"
    done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
    if re.search(r"contact|config|connect|resolve|plugin", done.stderr, re.I):
        return f"there is no SLURM to ask ({_reason(done)})"
    if done.returncode:
        raise UserError(f"sbatch would not take the job: {_reason(done)}")
    return ""


def _reason(done: subprocess.CompletedProcess) -> str:
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return re.sub("^(sbatch: |allocation failure: )?(error: |fatal: )?", "", lines[-1])


def launch(options: Options, job: Job) -> int:
    """Builds the environment here, checks the flags, submits and follows the job; returns its exit status."""
    gpus = bool(re.search("gpu|gres", options.slurm))
    if gpus and "LAB_ACCELERATOR" not in os.environ:
        # The submitting node has no GPU to query. CUDA 12 runs on every driver that CUDA 13 supports.
        os.environ["LAB_ACCELERATOR"] = "cuda12"
    os.environ.setdefault("LAB_ACCELERATOR", "cpu")
    text, path = script(job, options.slurm), job.folder / "slurm.sh"
    submit, build = ["sbatch", "--parsable", str(path)], [str(ROOT / "launch.sh"), "env"]
    if options.dry_run:
        unchecked = {"The flags of the experiment": check_flags(job, gpus), "The options of sbatch": test_only(text)}
        print(f"# {path}\n{text}")
        show(build, submit)
        for what, why in unchecked.items():
            print(f"# {what} {f'were not checked: {why}' if why else 'are right'}.")
        return 0
    tool("sbatch", "start this on a login node of the SLURM cluster (Debian: apt install slurm-client).")
    done = subprocess.run(build, stdout=subprocess.DEVNULL, env=os.environ | forwarded(job))
    if done.returncode:
        return done.returncode
    check_flags(job, gpus)  # find typos before queueing
    job.make_folder()
    replace_file(path, text)
    done = subprocess.run(submit, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch did not take the job: {_reason(done)} ({path})")
    number = done.stdout.strip().partition(";")[0]
    first = re.search(r"--array=(\d+)", text)
    log = job.folder / f"slurm-{number}{f'_{first[1]}' if first else ''}.log"
    say(f"job {number} is submitted; its output goes to {log}" + (" and beside it" if first else ""))
    return 0 if options.detach else follow(number, log)


def follow(number: str, log: Path, pause: float = 1.0) -> int:
    """Copies the log to stdout until the job ends; returns its exit status (1 if SLURM reports none).

    Ctrl-C stops following but not the job, and returns 130.
    """
    told, ends, position = "", 0, 0
    try:
        while True:
            state, reason, status = look(number)
            position = copy_new(log, position)
            # Require two polls: a job being requeued briefly appears as ended.
            ends = ends + 1 if state in ENDED else 0
            if ends == 2:
                break
            words = f"{state.lower()}{f' ({reason})' if reason != 'None' else ''}"
            if words != told and not ends:
                say(f"job {number} is {words}.")
                told = words
            time.sleep(pause)
    except KeyboardInterrupt:
        say(f"stopped following; job {number} continues. Follow it: tail -F {shlex.quote(str(log))}  "
            f"End it: scancel {number}")
        return 130
    say(f"job {number} ended: {state.lower()}, exit status {status}. Output: {log}")
    return status if status or state == "COMPLETED" else 1


def look(number: str) -> tuple[str, str, int]:
    """State, reason and exit status of a job or a whole job array, from SLURM's controller."""
    done = subprocess.run(["scontrol", "--oneliner", "show", "job", number], capture_output=True, text=True)
    if done.returncode:
        if "Invalid job id" in done.stderr:  # SLURM drops a job minutes after its end
            return "REVOKED", "None", 1
        return "UNKNOWN", "SLURM's controller does not answer", 1
    jobs = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in done.stdout.splitlines()]
    found = [(job["JobState"], job.get("Reason", "None"), int(job.get("ExitCode", "0:0").split(":")[0]))
             for job in jobs if "JobState" in job]
    going = [job for job in found if job[0] not in ENDED]  # of an array: a running job, else the worst
    return going[0] if going else max(found, key=lambda job: (job[2], job[0] != "COMPLETED"))


def copy_new(path: Path, position: int) -> int:
    """Copies a file from `position` on to stdout; returns the new position."""
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        while block := file.read(1 << 16):
            sys.stdout.buffer.write(block)
            position += len(block)
    sys.stdout.flush()
    return position
