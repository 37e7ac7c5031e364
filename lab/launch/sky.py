"""`--sky OPTIONS`: writes a SkyPilot task to the run folder and launches it (cloud GPUs, TPUs, Kubernetes, SLURM).

SkyPilot provisions machines, copies the checkout and starts one process per node (lab/parallel/processes.py reads its
variables). Spot machines become a managed job, which SkyPilot recovers after preemption and after exit status 75. A run
folder on a machine's local disk is lost with the machine; the bucket keeps checkpoints and a copy of the run folder in
run/.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import UserError
from lab.files import ROOT, replace_file
from lab.launch.job import BIN, PREPARE, Job, forwarded, show, split, tool
from lab.parallel.shared_secret import new_secret

if TYPE_CHECKING:
    from lab.launch.options import Options

# Options of `sky launch` that are set in the task -> their names in its resources.
RESOURCES = {"--gpus": "accelerators", "--infra": "infra", "--cpus": "cpus", "--memory": "memory",
             "--disk-size": "disk_size", "--image-id": "image_id", "--instance-type": "instance_type"}
HOW = "install SkyPilot in an environment of its own, for example: uv tool install 'skypilot[gcp,kubernetes,slurm]'"


def task(job: Job, options: str) -> dict[str, Any]:
    """The SkyPilot task, as a dict for its YAML.

    Raises:
      UserError: an option is unknown or lacks its value.
    """
    words, resources, nodes = split(options, "--sky"), {}, 1
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag == "--use-spot":
            resources["use_spot"] = True
            continue
        if flag not in (*RESOURCES, "--num-nodes"):
            raise UserError(f"--sky does not know {flag}. It takes --use-spot, --num-nodes, {', '.join(RESOURCES)}; "
                            f"other settings can be added to the task that --dry-run prints.")
        if not equals and not words:
            raise UserError(f"{flag} in --sky needs a value.")
        value = value if equals else words.pop(0)
        if flag == "--num-nodes":
            if not value.isdigit():
                raise UserError(f"--num-nodes {value} in --sky must be a number.")
            nodes = int(value)
        else:
            resources[RESOURCES[flag]] = int(value) if flag == "--disk-size" and value.isdigit() else value
    if resources.get("use_spot"):
        resources["job_recovery"] = {"recover_on_exit_codes": [75]}
    if str(resources.get("accelerators", "")).startswith("tpu-"):
        resources.setdefault("infra", "gcp")
    environ = forwarded(job)
    return {"name": job.name, "num_nodes": nodes, "workdir": str(ROOT), "resources": resources,
            **({"envs": environ} if environ else {}), "setup": PREPARE,
            "run": f"{BIN} PYTHONUNBUFFERED=1\n./launch.sh {shlex.join(job.elsewhere())}"}


def launch(options: Options, job: Job) -> int:
    """Writes the task and runs SkyPilot, which streams its output; returns SkyPilot's status."""
    found = task(job, options.sky)
    if job.words[0].endswith(".py") and not (job.bucket or Path(job.run_dir).is_absolute()):
        disk = "" if job.study else ", or --run-dir with an absolute path on a disk that outlives them"
        raise UserError(f"Machines made by SkyPilot are gone after the run. {job.add_bucket}{disk}.")
    if job.study and found["num_nodes"] > 1:
        raise UserError("A study runs in one process at a time, and SkyPilot starts one on each of --num-nodes: ask "
                        "for one node.")
    path = job.folder / "sky.yaml"
    # JSON is valid YAML, and quotes every string safely.
    text = json.dumps(found, indent=2) + "\n"
    managed = found["resources"].get("use_spot", False)
    command = ["sky", *(["jobs", "launch"] if managed else ["launch", "--cluster", job.name, "--down"]), "--yes",
               "--env", "LAB_SECRET", *(["--detach-run"] if options.detach else []), str(path)]
    if options.dry_run:
        print(f"# {path}\n{text}")
        show(command)
        return 0
    tool("sky", HOW)
    job.make_folder()
    replace_file(path, text)
    return subprocess.run(command, env=os.environ | {"LAB_SECRET": new_secret()}).returncode
