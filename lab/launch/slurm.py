"""`--slurm`: writes an sbatch script into the run folder, submits it, follows its output until the job ends."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import UserError
from lab.files import replace_file
from lab.launch.job import ROOT, Job, exports, say, show, tool

if TYPE_CHECKING:
    from lab.launch import Options

# Status 75 means saved: the job goes back into the queue with its number and its output file. SLURM_WAIT: seconds after
# the end of the first process in which the others must end, too; --kill-on-bad-exit=1 would signal them at once, and
# turn their 75 or 2 into the signal's 143. The loop around `wait` is there because a signal to this script ends `wait`
# early. srun ignores the processors per task that sbatch was asked for, hence SRUN_CPUS_PER_TASK.
SCRIPT = """\
#!/bin/bash
# Written by ./launch.sh --slurm; can be submitted again with sbatch.
#SBATCH --job-name={name}
#SBATCH --output="{log}"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
{tasks}#SBATCH {options}
{exports}export PYTHONUNBUFFERED=1 SLURM_WAIT="${{SLURM_WAIT:-30}}"
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
      UserError: the options hold a line break, or would lead the output elsewhere.
    """
    if "\n" in options or "\r" in options:
        raise UserError("The options of --slurm hold a line break; put them on one line.")
    if found := re.search(r"(^|\s)(-[oea]|--output|--error|--array)(?![a-z-])", options):
        raise UserError(f"{found[2]} does not go with --slurm: there is one job, and its output goes to the "
                        f"run folder.")
    asked = re.search(r"(^|\s)(-n|--ntasks|--gpus-per-task|--tasks-per-node)", options)
    log = str(job.folder).replace("%", "%%") + "/slurm-%j.log"    # sbatch replaces %x and the like
    return SCRIPT.format(
        name=job.name, log=log, options=options.strip(), cwd=shlex.quote(os.getcwd()),
        tasks="" if asked else "#SBATCH --ntasks-per-node=1\n",
        exports=exports(), command=shlex.join([str(ROOT / "launch.sh"), *job.words]),
    )  # fmt: skip


def launch(options: Options, job: Job) -> int:
    """Builds the environment here, submits, follows; returns the job's exit status."""
    if re.search("gpu|gres", options.slurm) and "LAB_ACCELERATOR" not in os.environ:
        # The submitting node has no GPU to ask. CUDA 12 runs on every driver that CUDA 13 runs on.
        os.environ["LAB_ACCELERATOR"] = "cuda12"
    os.environ.setdefault("LAB_ACCELERATOR", "cpu")
    text, path = script(job, options.slurm), job.folder / "slurm.sh"
    submit, build = ["sbatch", "--parsable", str(path)], [str(ROOT / "launch.sh"), "env"]
    if options.dry_run:
        print(f"# {path}\n{text}")
        show(build, submit)
        return 0
    tool("sbatch", "start this on a login node of the SLURM cluster (Debian: apt install slurm-client).")
    done = subprocess.run(build, stdout=subprocess.DEVNULL)
    if done.returncode:
        return done.returncode
    job.make_folder()
    replace_file(path, text)
    done = subprocess.run(submit, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"sbatch did not take the job: {re.sub('^sbatch: (error: |fatal: )?', '', reason)} ({path})")
    number = done.stdout.strip().partition(";")[0]
    log = job.folder / f"slurm-{number}.log"
    say(f"job {number} is submitted; its output goes to {log}")
    return 0 if options.detach else follow(number, log)


def follow(number: str, log: Path, pause: float = 1.0) -> int:
    """Copies the log to stdout until the job ends; its exit status (1 where SLURM gives none).

    Ctrl-C ends only the following, with 130.
    """
    told, ends, position = "", 0, 0
    try:
        while True:
            state, reason, status = look(number)
            position = copy_new(log, position)
            # Twice: a job that is being queued again is for a moment shown as ended.
            ends = ends + 1 if state in ENDED else 0
            if ends == 2:
                break
            words = f"{state.lower()}{f' ({reason})' if reason != 'None' else ''}"
            if words != told and not ends:
                say(f"job {number} is {words}.")
                told = words
            time.sleep(pause)
    except KeyboardInterrupt:
        say(f"stopped following; job {number} goes on. Look: tail -F {shlex.quote(str(log))}  End it: scancel {number}")
        return 130
    say(f"job {number} ended: {state.lower()}, exit status {status}. Output: {log}")
    return status if status or state == "COMPLETED" else 1


def look(number: str) -> tuple[str, str, int]:
    """State, reason and exit status of a job as SLURM's controller has them."""
    done = subprocess.run(["scontrol", "--oneliner", "show", "job", number], capture_output=True, text=True)
    if done.returncode:
        if "Invalid job id" in done.stderr:  # forgotten, some minutes after its end
            return "REVOKED", "None", 1
        return "UNKNOWN", "SLURM's controller does not answer", 1
    fields = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return fields["JobState"], fields.get("Reason", "None"), int(fields.get("ExitCode", "0:0").split(":")[0])


def copy_new(path: Path, position: int) -> int:
    """Writes what a file holds from `position` on to stdout; the new position."""
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        while block := file.read(1 << 16):
            sys.stdout.buffer.write(block)
            position += len(block)
    sys.stdout.flush()
    return position
