"""lab/launch without its engines: what is printed and written, mistakes, and Cloud TPU with a stand-in for gcloud."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.launching import ROOT, run, start, wait_for, write_script

SPECIAL = "two words, $HOME 'quoted' \"twice\" `id` ; rm -rf *"


def dry(checkout: Path, environ: dict[str, str], *words: str) -> str:
    """What a dry run prints; nothing may be written, built or started."""
    def files() -> list[str]:
        return sorted(str(p) for p in checkout.rglob("*") if "__pycache__" not in str(p))

    before = files()
    done = run(checkout, environ | {"PATH": "/usr/bin:/bin"}, *words)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert files() == before
    return done.stdout


def fails(checkout: Path, environ: dict[str, str], *words: str) -> str:
    """The message of a mistake: one line, exit status 2."""
    done = run(checkout, environ, *words)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def printed_commands(text: str) -> list[list[str]]:
    """The commands of a dry run, each of which may span lines, as words."""
    parts = re.split(r"^(?=[+#] )", text, flags=re.MULTILINE)
    return [shlex.split(part)[1:] for part in parts if part.startswith("+ ")]


# --- the command line -------------------------------------------------------------------------------------------------


def test_one_help_text_has_all_flags_and_needs_no_jax():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from lab.launch import start\n"
            "assert start.main(['--slurm', '--help']) == 0\n"
            "assert start.main(['--slurm', '--nodes=2', '--dry-run', 'experiments/gpt_small.py']) == 0\n"
            "outside = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
            "print('imported', sorted(m for m in outside if m in ('jax', 'numpy', 'tyro', 'flax')))")
    done = subprocess.run([sys.executable, "-I", "-c", code, str(ROOT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for flag in ("--slurm", "--hosts", "--tpu", "--zone", "--create", "--spot", "--gcloud-flags", "--sky", "--detach",
                 "--dry-run"):
        assert f"  {flag} " in done.stdout, flag
    assert "imported []" in done.stdout


def test_mistakes_on_the_command_line(checkout, environ):
    assert "--slurm needs a value" in fails(checkout, environ, "--slurm")
    assert "--slurm needs a value" in fails(checkout, environ, "--slurm", "experiments/tiny.py")
    assert "Say what to start" in fails(checkout, environ, "--slurm", "--nodes=2")
    assert "meant experiments/tiny.py" in fails(checkout, environ, "--slurm", "--nodes=2", "experiments/tinny.py")
    assert "exclude each other" in fails(checkout, environ, "--slurm", "-n2", "--hosts", "a,b", "experiments/tiny.py")
    assert "meant --dry-run" in fails(checkout, environ, "--slurm", "-n2", "--dry-runn", "experiments/tiny.py")
    assert "come after its file" in fails(checkout, environ, "--slurm", "-n2", "--steps", "5", "experiments/tiny.py")
    assert "--zone does not go" in fails(checkout, environ, "--hosts", "a", "--zone", "z", "experiments/tiny.py")
    assert "--spot goes with --create" in fails(checkout, environ, "--tpu", "pod", "--spot", "experiments/tiny.py")
    for engine in (("--slurm", "-n1"), ("--hosts", "a,b"), ("--tpu", "pod"), ("--sky", "--cpus 4")):
        said = fails(checkout, environ, *engine, "experiments/tiny.py", "--run-dir=gs://b/x")
        assert "--run-dir is a folder on the machine of process 0" in said and "--checkpoint-dir gs://" in said
    assert "no value" in fails(checkout, environ, "--slurm", "-n2", "--detach=3", "experiments/tiny.py")


def test_a_missing_tool_is_one_sentence_with_how_to_get_it(checkout, environ, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "readlink", "git"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    bare = environ | {"PATH": str(tmp_path / "bin")}
    bucket = ("experiments/tiny.py", "--checkpoint-dir", "gs://b/x")
    assert "sbatch was not found" in fails(checkout, bare, "--slurm", "--nodes=2", "experiments/tiny.py")
    assert "apt install openmpi-bin" in fails(checkout, bare, "--hosts", "a,b", "experiments/tiny.py")
    assert "cloud.google.com/sdk" in fails(checkout, bare, "--tpu", "pod", "experiments/tiny.py")
    assert "uv tool install" in fails(checkout, bare, "--sky", "--cpus 4", *bucket)


def test_the_same_command_names_the_same_run_and_an_edited_experiment_another(checkout, environ):
    def folder(*flags: str) -> str:
        return re.search(r"--run-dir (\S+)", dry(checkout, environ, "--slurm", "-n1", "experiments/tiny.py",
                                                *flags, "--dry-run"))[1]

    first = folder("--steps", "5")
    assert first == folder("--steps", "5") and re.fullmatch(r"runs/tiny-[0-9a-f]{8}", first)
    assert first != folder("--steps", "6")
    file = checkout / "experiments/tiny.py"
    text = file.read_text()
    file.write_text(text.replace("1e-2", "2e-2"))
    try:
        assert first != folder("--steps", "5")
    finally:
        file.write_text(text)
    assert folder("--run-dir", "mine") == "mine"


# --- SLURM ------------------------------------------------------------------------------------------------------------


def test_slurm_script(checkout, environ):
    variables = {k: v for k, v in environ.items() if k != "LAB_ACCELERATOR"}
    text = dry(checkout, variables, "--slurm", "--nodes=2 --gpus-per-node=8 --time=4:00:00", "--dry-run",
               "experiments/tiny.py", "--note", SPECIAL)
    folder = re.search(r"^# (.*)/slurm.sh$", text, re.M)[1]
    assert folder.startswith(f"{checkout}/runs/tiny-") and folder.endswith("/launch")
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert f'#SBATCH --output="{folder}/slurm-%j.log"' in lines
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=TERM@120"} < set(lines)
    assert lines[-2:] == ["#SBATCH --ntasks-per-node=1", "#SBATCH --nodes=2 --gpus-per-node=8 --time=4:00:00"]
    assert "export LAB_ACCELERATOR=cuda12" in text, "the login node has no GPU to ask"
    srun = shlex.split(next(line for line in text.splitlines() if line.startswith("srun")))
    assert srun[:3] == ["srun", "--kill-on-bad-exit=0", f"{checkout}/launch.sh"]
    assert srun[3:6] == ["experiments/tiny.py", "--note", SPECIAL]
    assert printed_commands(text) == [[f"{checkout}/launch.sh", "env"], ["sbatch", "--parsable", f"{folder}/slurm.sh"]]
    script = text.partition("slurm.sh\n")[2].partition("\n+ ")[0]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_leaves_the_number_of_tasks_to_the_user_and_refuses_line_breaks(checkout, environ):
    for options in ("-n 4", "--ntasks=4", "--ntasks-per-node 8", "--gpus-per-task=1 --nodes=2"):
        text = dry(checkout, environ, "--slurm", options, "--dry-run", "experiments/tiny.py")
        assert "#SBATCH --ntasks-per-node=1" not in text and f"#SBATCH {options}\n" in text
    for options in ("-o x", "--output=x", "-n1 --array=0-3", "-n1 -a 0"):
        assert "does not go with --slurm" in fails(checkout, environ, "--slurm", options, "experiments/tiny.py")
    assert "line break" in fails(checkout, environ, "--slurm", "-n1\nrm x", "--dry-run", "experiments/tiny.py")


def test_slurm_looks_at_the_flags_before_anything_waits_in_a_queue(checkout, environ, tmp_path):
    """By --dry-run of the experiment, in an environment that is there; the stand-in refuses --wrong."""
    text = dry(checkout, environ, "--slurm", "-n1", "--dry-run", "experiments/tiny.py")
    assert "# The flags of the experiment were not checked: no environment is built here yet" in text
    assert "# The options of sbatch were not checked: " in text
    assert run(checkout, environ, "env").returncode == 0
    text = dry(checkout, environ, "--slurm", "-n1", "--dry-run", "experiments/tiny.py")
    assert "# The flags of the experiment are right." in text
    for words in (["--dry-run"], []):
        said = fails(checkout, environ | {"PATH": sbatch(tmp_path)}, "--slurm", "-n1", *words, "experiments/tiny.py",
                     "--wrong", "There is no --stepz.")
        assert said == "error: There is no --stepz.\n" and not (tmp_path / "submitted").exists()


def test_slurm_asks_sbatch_about_its_options(checkout, environ, tmp_path):
    path = {"PATH": sbatch(tmp_path)}
    said = fails(checkout, environ | path, "--slurm", "-n1 --partition=none", "--dry-run", "experiments/tiny.py")
    assert said == "error: sbatch would not take the job: invalid partition specified: none\n"
    done = run(checkout, environ | path, "--slurm", "-n1", "--dry-run", "experiments/tiny.py")
    assert "# The options of sbatch are right." in done.stdout and not (tmp_path / "submitted").exists()


def sbatch(folder: Path) -> str:
    """PATH with a stand-in for sbatch, that refuses a partition and notes what is submitted."""
    write_script(folder / "sbatch", f"""#!/bin/sh
[ "$1" = --test-only ] || {{ touch {folder}/submitted; exit 1; }}
grep -q partition=none && {{ echo "sbatch: error: invalid partition specified: none" >&2; exit 1; }}
echo "sbatch: Job 1 to start at 2026-01-01T00:00:00" >&2
""")
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize("options, array, rest", [
    ("-N 2 -n3 --gpus=1", "0-5", "--gpus=1"), ("--nodes=4 --time 5", "0-3", "--time 5"),
    ("--time=5", "0-0", "--time=5"), ("--array=1-7%2 --ntasks 1", "1-7%2", "")])
def test_a_study_becomes_a_job_array_of_workers(checkout, environ, options, array, rest):
    """Each is a process of its own: a study refuses several processes of one run. No --run-dir, which it has not."""
    text = dry(checkout, environ, "--slurm", options, "--dry-run", "experiments/tiny.py", "--vary", "batch=16")
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert lines[-2:] == [f"#SBATCH --array={array}", f"#SBATCH --nodes=1 --ntasks=1 {rest}".rstrip()]
    assert "slurm-%A_%a.log" in text and "srun --kill-on-bad-exit=0" in text and "--run-dir" not in text
    file, name = checkout / "experiments/tiny_study.py", "experiments/tiny_study.py"
    file.write_text("from lab.study.design.arms import Study\nstudy = local = Study(3)\n")
    try:
        assert f"--array={array}" in dry(checkout, environ, "--slurm", options, "--dry-run", name)
    finally:
        file.unlink()


def test_a_study_elsewhere(checkout, environ):
    study = ("experiments/tiny.py", "--vary", "batch=16")
    assert "a study has a worker for each" in fails(checkout, environ, "--slurm", "--nodes=2-4", *study)
    assert "A study runs in one process at a time" in fails(checkout, environ, "--hosts", "a,b", "--dry-run", *study)
    text = dry(checkout, environ, "--tpu", "pod", "--dry-run", *study)
    assert re.search(r"tiny.py --vary batch=16 --studies runs/tiny-\w{8}$", text, re.M) and "--run-dir" not in text
    sky, pod = ("--sky", "--cpus 4"), ("--tpu", "pod", "--zone", "z", "--create")
    for engine in (sky, (*pod, "v5e-8", "--spot")):
        said = fails(checkout, environ, *engine, "--dry-run", *study)
        assert "Add --studies with an absolute path" in said and "--checkpoint-dir" not in said and "--run" not in said
        assert "--studies /disk/x" in dry(checkout, environ, *engine, "--dry-run", *study, "--studies", "/disk/x")
    disk = ("--dry-run", *study, "--studies", "/disk/x")
    assert "ask for one node" in fails(checkout, environ, "--sky", "--num-nodes 2", *disk)
    assert "take a TPU of one" in fails(checkout, environ, *pod, "v5e-16", *disk)


@pytest.mark.parametrize("extras, wanted", [(None, "bucket"), ("plan", "plan,bucket"), ("bucket, plan", "bucket,plan")])
def test_a_bucket_brings_its_packages(checkout, environ, extras, wanted):
    variables = environ | ({"LAB_EXTRAS": extras} if extras else {})
    bucket = ("--dry-run", "experiments/tiny.py", "--checkpoint-dir", "gs://b/x")
    text = dry(checkout, variables, "--tpu", "pod", *bucket)
    assert text.count(f"export LAB_EXTRAS={wanted}") == 2  # where it is built, and where it starts
    for engine in (("--slurm", "-n1"), ("--hosts", "a,b")):
        assert f"export LAB_EXTRAS={wanted}" in dry(checkout, variables, *engine, *bucket)
    text = dry(checkout, variables, "--sky", "--cpus 4", *bucket)
    assert json.loads(text[text.index("{"):text.rindex("}") + 1])["envs"]["LAB_EXTRAS"] == wanted
    text = dry(checkout, variables, "--tpu", "pod", "--dry-run", "experiments/tiny.py")
    assert ("LAB_EXTRAS" in text) == bool(extras)


def test_an_open_quote_is_a_sentence(checkout, environ):
    for engine in (["--slurm", "--comment='x"], ["--sky", "--cpus '4"], ["--tpu", "pod", "--gcloud-flags", "'"]):
        assert "No closing quotation" in fails(checkout, environ, *engine, "--dry-run", "experiments/tiny.py")


def test_dry_run_after_the_experiment_submits_nothing_either(checkout, environ):
    text = dry(checkout, environ, "--slurm", "-n1", "experiments/tiny.py", "--dry-run")
    assert "+ sbatch" in text and "tiny.py --run-dir" in text


# --- ssh hosts --------------------------------------------------------------------------------------------------------


def test_hosts_commands(checkout, environ):
    text = dry(checkout, environ, "--hosts", "h1,me@h2", "--dry-run", "experiments/tiny.py", "--note", SPECIAL)
    commands = printed_commands(text)
    starts = [c for c in commands if c[0] == "mpirun"]
    assert len(starts) == 2, "in place, and on copies"
    for command in starts:
        assert command[command.index("-np") + 1] == "2" and command[command.index("-H") + 1] == "h1:1,me@h2:1"
        assert command[command.index("--bind-to") + 1] == "none"
        script = command[-1]
        assert re.search(r"LAB_COORDINATOR=h1:\d+\n", script)
        assert "LAB_PROCESSES=$OMPI_COMM_WORLD_SIZE LAB_PROCESS_ID=$OMPI_COMM_WORLD_RANK" in script
        assert shlex.split(script.rpartition("exec ")[2])[1:4] == ["experiments/tiny.py", "--note", SPECIAL]
        subprocess.run(["bash", "-n", "-c", script], check=True)
    assert sum("tar -xzf" in " ".join(c) and "me@h2" in c for c in commands) == 1


def test_hosts_mistakes(checkout, environ):
    assert "is not a host name" in fails(checkout, environ, "--hosts", "a,", "experiments/tiny.py")
    assert "is not a host name" in fails(checkout, environ, "--hosts", "-oProxyCommand=x", "experiments/tiny.py")
    assert "names a host twice" in fails(checkout, environ, "--hosts", "a,b,a", "experiments/tiny.py")


def test_hosts_outside_the_checkout(checkout, environ, tmp_path):
    """A copy of the checkout has not the experiment of another folder."""
    (tmp_path / "mine.py").write_text((checkout / "experiments/tiny.py").read_text())
    assert "is outside" in fails(checkout, environ, "--hosts", "a", "--dry-run", str(tmp_path / "mine.py"))


# --- SkyPilot ---------------------------------------------------------------------------------------------------------


SKY = {
    "TPU v5e, spot": ("--gpus tpu-v5e-16 --use-spot", {"accelerators": "tpu-v5e-16", "use_spot": True, "infra": "gcp",
                                                       "job_recovery": {"recover_on_exit_codes": [75]}}),
    "TPU v6e, spot": ("--gpus=tpu-v6e-8 --use-spot --infra gcp/us-east5",
                      {"accelerators": "tpu-v6e-8", "use_spot": True, "infra": "gcp/us-east5",
                       "job_recovery": {"recover_on_exit_codes": [75]}}),
    "cloud GPU": ("--gpus H100:8 --num-nodes 2 --disk-size 500", {"accelerators": "H100:8", "disk_size": 500}),
    "Kubernetes": ("--gpus H100:1 --infra k8s", {"accelerators": "H100:1", "infra": "k8s"}),
    "SLURM": ("--infra slurm --cpus 4+ --num-nodes 2", {"infra": "slurm", "cpus": "4+"}),
}


def sky_task(checkout: Path, environ: dict[str, str], options: str) -> tuple[dict, list[str]]:
    text = dry(checkout, environ, "--sky", options, "--dry-run", "experiments/tiny.py", "--note", SPECIAL,
               "--checkpoint-dir", "gs://b/x")
    return json.loads(text[text.index("{"):text.rindex("}") + 1]), printed_commands(text)[-1]


@pytest.mark.parametrize("case", SKY)
def test_sky_task(checkout, environ, case):
    options, resources = SKY[case]
    task, command = sky_task(checkout, environ, options)
    assert task["resources"] == resources and task["workdir"] == str(checkout)
    assert task["num_nodes"] == (2 if "--num-nodes 2" in options else 1)
    assert shlex.split(task["run"].splitlines()[-1])[1:4] == ["experiments/tiny.py", "--note", SPECIAL]
    assert command[:3] == (["sky", "jobs", "launch"] if "spot" in options else ["sky", "launch", "--cluster"])
    for text in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", text], check=True)


def test_sky_tasks_pass_skypilots_own_validator(checkout, environ, tmp_path):
    sky = shutil.which("sky")
    if sky is None:
        pytest.skip("SkyPilot is not on PATH (uv tool install 'skypilot[gcp,kubernetes,slurm]')")
    python = str(Path(os.path.realpath(sky)).parent / "python")
    check = "import sys, sky\nfor path in sys.argv[1:]: print(sky.Task.from_yaml(path).num_nodes)"
    for case, (options, _) in SKY.items():
        (tmp_path / f"{case}.yaml").write_text(json.dumps(sky_task(checkout, environ, options)[0]))
    paths = sorted(map(str, tmp_path.glob("*.yaml")))
    home = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([python, "-c", check, *paths], capture_output=True, text=True, timeout=300, env=home)
    nodes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert nodes == ["2" if "SLURM" in p or "GPU" in p else "1" for p in paths], done.stderr
    wrong = json.loads(Path(paths[0]).read_text())
    wrong["resources"]["acelerators"] = wrong["resources"].pop("infra", "x")
    Path(paths[0]).write_text(json.dumps(wrong))
    done = subprocess.run([python, "-c", check, paths[0]], capture_output=True, text=True, timeout=300, env=home)
    assert done.returncode and "acelerators" in done.stderr


def test_sky_mistakes(checkout, environ):
    assert "--checkpoint-dir with a bucket" in fails(checkout, environ, "--sky", "--cpus 4", "experiments/tiny.py")
    assert "does not know --gpu" in fails(checkout, environ, "--sky", "--gpu H100", "experiments/tiny.py")
    assert "must be a number" in fails(checkout, environ, "--sky", "--num-nodes two", "experiments/tiny.py")
    assert "needs a value" in fails(checkout, environ, "--sky", "--gpus", "experiments/tiny.py")


# --- Cloud TPU --------------------------------------------------------------------------------------------------------

# The API's side: a VM is a file with its state; its workers are folders, in which `ssh` runs commands.
GCLOUD = textwrap.dedent('''\
    #!{python}
    import json, os, pathlib, shutil, subprocess, sys
    cloud = pathlib.Path(os.environ["CLOUD"])
    with open(cloud / "calls", "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    words = [w for w in sys.argv[1:] if not w.startswith("-")][2:]
    flags = dict(w.lstrip("-").partition("=")[::2] for w in sys.argv[1:] if w.startswith("-"))
    vm, request, workers = cloud / "vm", cloud / "request", int(os.environ.get("WORKERS", "1"))
    def missing():
        sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/pod' was not found")
    verb = words[:2]
    if verb == ["tpu-vm", "describe"]:
        if not vm.exists():
            missing()
        print(json.dumps({{"state": vm.read_text(), "networkEndpoints": [{{}}] * workers}}))
    elif verb == ["queued-resources", "create"]:
        if request.exists():
            sys.exit("ERROR: ALREADY_EXISTS")
        request.write_text("ACTIVE")
        vm.write_text("READY")
    elif verb == ["queued-resources", "describe"]:
        if not request.exists():
            missing()
        print(request.read_text())
    elif verb == ["queued-resources", "delete"]:
        request.unlink()
        vm.unlink(missing_ok=True)
        for copy in cloud.glob("worker-*/.cache/lab/checkouts/*"):    # its disks; the bucket, which is gs:/, stays
            for name in ("launch", "runs"):
                shutil.rmtree(copy / name, ignore_errors=True)
    elif not vm.exists() or vm.read_text() != "READY":
        sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the VM is not running")
    else:
        chosen = range(workers) if flags["worker"] == "all" else [int(flags["worker"])]
        homes = [cloud / f"worker-{{i}}" for i in chosen]
        for i, home in zip(chosen, homes):
            home.mkdir(exist_ok=True)
            if verb == ["tpu-vm", "ssh"]:
                environ = dict(os.environ, HOME=str(home), LAB_PROCESS_ID=str(i), LAB_PROCESSES=str(workers))
                code = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=environ).returncode
                if code:
                    sys.exit(code)
            elif words[2].startswith("pod:"):
                shutil.copytree(home / words[2][4:], pathlib.Path(words[3]) / pathlib.Path(words[2]).name,
                                dirs_exist_ok=True)
            else:
                shutil.copy(words[2], home / words[3].partition(":")[2])
''')


class Cloud:
    """The stand-in and what was asked of it."""

    def __init__(self, folder: Path, environ: dict[str, str]):
        self.folder = folder
        (folder / "bin").mkdir()
        write_script(folder / "bin/gcloud", GCLOUD.format(python=sys.executable))
        self.environ = environ | {"PATH": f"{folder}/bin:{environ['PATH']}", "CLOUD": str(folder),
                                  "LAB_POLL_SECONDS": "0.2"}

    def calls(self) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [" ".join(w for w in json.loads(line) if not w.startswith("-"))[13:] for line in lines]


@pytest.fixture
def cloud(tmp_path: Path, environ: dict[str, str]) -> Cloud:
    return Cloud(tmp_path, environ)


def test_tpu_commands(checkout, environ):
    text = dry(checkout, environ, "--tpu", "pod", "--zone", "us-east5-b", "--create", "v5e-16", "--spot",
               "--gcloud-flags", "--tunnel-through-iap", "--dry-run", "experiments/tiny.py", "--note", SPECIAL,
               "--checkpoint-dir", "gs://b/x")
    commands = printed_commands(text)
    assert all(c[:4] == ["gcloud", "--quiet", "compute", "tpus"] and "--zone=us-east5-b" in c for c in commands)
    create = next(c for c in commands if "create" in c)
    assert create[4:-1] == ["queued-resources", "create", "pod", "--node-id=pod", "--accelerator-type=v5litepod-16",
                            "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert all("--tunnel-through-iap" in c for c in commands if "ssh" in c or "scp" in c)
    command = next(line for line in text.splitlines() if line.startswith("./launch.sh"))
    assert shlex.split(command)[1:4] == ["experiments/tiny.py", "--note", SPECIAL]
    for command in (word for c in commands for word in c if word.startswith("--command=")):
        subprocess.run(["bash", "-n", "-c", command.removeprefix("--command=")], check=True)


def test_tpu_commands_are_ones_that_gcloud_knows(checkout, environ):
    """The real client reads each command as far as it can without an account; one with a wrong flag does not pass."""
    if shutil.which("gcloud") is None:
        pytest.skip("the Google Cloud CLI is not installed")
    text = dry(checkout, environ, "--tpu", "pod", "--zone", "us-east5-b", "--create", "v5e-16", "--spot", "--dry-run",
               "experiments/tiny.py", "--checkpoint-dir", "gs://b/x")
    environ = dict(os.environ, CLOUDSDK_CONFIG=str(checkout.parent / "gcloud"), CLOUDSDK_CORE_DISABLE_PROMPTS="1",
                   CLOUDSDK_CORE_PROJECT="none", CLOUDSDK_METRICS_ENVIRONMENT="test")

    def refused(command: list[str]) -> bool:
        done = subprocess.run([*command, "--account="], capture_output=True, text=True, env=environ, timeout=60)
        assert done.returncode, done.stdout
        phrases = ("unrecognized arguments", "Invalid choice", "must be specified")
        return any(phrase in done.stderr for phrase in phrases)

    kinds = {tuple(c[4:6]): c for c in printed_commands(text)}
    assert len(kinds) == 6
    for command in kinds.values():
        assert not refused(command), command
    assert refused([*kinds["tpu-vm", "ssh"], "--no-such-flag"])


def test_tpu_existing_vm_runs_and_brings_the_run_folder(checkout, cloud):
    (cloud.folder / "vm").write_text("READY")
    done = run(checkout, cloud.environ, "--tpu", "pod", "experiments/tiny.py", "--note", SPECIAL,
               "--run-dir", "runs/tpu")
    assert done.returncode == 0, done.stderr
    assert f"arguments {['experiments/tiny.py', '--note', SPECIAL, '--run-dir', 'runs/tpu']} fresh" in done.stdout
    assert (checkout / "runs/tpu/ran-0").exists()
    assert not any(call.startswith("queued") for call in cloud.calls())
    assert (checkout / "runs/tpu/launch/start.sh").exists()


def test_tpu_is_created_preempted_created_again(checkout, cloud):
    environ = cloud.environ | {"WORKERS": "2"}
    words = ("--tpu", "pod", "--create", "v5e-16", "--spot", "experiments/tiny.py", "--hang", "--run-dir", "runs/spot",
             "--checkpoint-dir", "gs://bucket/x")
    process = start(checkout, environ, *words)
    try:
        wait_for(lambda: len(list(cloud.folder.glob("worker-*/.cache/lab/checkouts/*/runs/spot/up-*"))) == 2, 60,
                 "the start of both workers")
        (cloud.folder / "vm").write_text("PREEMPTED")    # and its machines end with all that runs on them
        for pid in cloud.folder.glob("worker-*/.cache/lab/checkouts/*/launch/pid"):
            os.killpg(int(pid.read_text()), signal.SIGTERM)
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, (out, err)
    assert "was preempted" in err and "costs money" in err and "restored" in out
    assert not list(cloud.folder.glob("worker-*/.cache/lab/checkouts/*/runs/spot/up-*")), "the first disks are lost"
    assert (checkout / "runs/spot/ran-0").exists() and not (checkout / "runs/spot/ran-1").exists()
    assert not (checkout / "runs/spot/saved-0").exists(), "it is in the bucket"
    asked = [call for call in cloud.calls() if call.startswith("queued")]
    assert [a.split()[1] for a in asked if "describe" not in a] == ["create", "delete", "create"]
    assert sum("scp" in call for call in cloud.calls()) == 3, "the new machines have new disks; one is the run folder"


def test_tpu_starts_again_after_75_without_copying(checkout, cloud):
    (cloud.folder / "vm").write_text("READY")
    process = start(checkout, cloud.environ, "--tpu", "pod", "experiments/tiny.py", "--hang", "--run-dir", "runs/again")
    pattern = "worker-0/.cache/lab/checkouts/*"
    try:
        wait_for(lambda: list(cloud.folder.glob(f"{pattern}/runs/again/up-0")), 60, "the start")
        os.killpg(int(next(cloud.folder.glob(f"{pattern}/launch/pid")).read_text()), signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "starting it again" in err, (out, err)
    assert "saved 0" in out and "restored" in out
    assert sum("scp" in call for call in cloud.calls()) == 2, "the files went there, and the run folder came back"


def test_tpu_ctrl_c_leaves_the_run_and_the_same_command_follows_it(checkout, cloud):
    (cloud.folder / "vm").write_text("READY")
    words = ("--tpu", "pod", "experiments/tiny.py", "--hang", "--run-dir", "runs/c")
    process = start(checkout, cloud.environ, *words)
    pattern = "worker-0/.cache/lab/checkouts/*"
    wait_for(lambda: list(cloud.folder.glob(f"{pattern}/runs/c/up-0")), 60, "the start")
    wait_for(lambda: "tail" in (cloud.folder / "calls").read_text(), 20, "the following")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "the run continues" in err and "kill -TERM" in err, err
    pid = int(next(cloud.folder.glob(f"{pattern}/launch/pid")).read_text())
    os.kill(pid, 0)
    again = start(checkout, cloud.environ, *words)
    wait_for(lambda: (cloud.folder / "calls").read_text().count("tail") == 2, 20, "the following")
    os.killpg(pid, signal.SIGTERM)    # the run saves; then it is started again
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and "runs on pod already" in err and "fresh" in out and "restored" in out, (out, err)


def test_tpu_mistakes(checkout, cloud):
    def said(*words: str) -> str:
        return fails(checkout, cloud.environ, *words)

    bucket = ("experiments/tiny.py", "--checkpoint-dir", "gs://b/x")
    assert "does not exist" in said("--tpu", "pod", *bucket)
    assert "not a TPU type" in said("--tpu", "pod", "--create", "h100", *bucket)
    assert "gcluster" in said("--tpu", "pod", "--create", "tpu7x-8", *bucket)
    assert "not the name of a TPU VM" in said("--tpu", "Pod!", *bucket)
    assert "share no disk" in said("--tpu", "pod", "--create", "v5e-16", "experiments/tiny.py")
    assert "loses its disk" in said("--tpu", "pod", "--create", "v5e-8", "--spot", "experiments/tiny.py")
    (cloud.folder / "vm").write_text("READY")
    cloud.environ["WORKERS"] = "2"
    assert "share no disk" in said("--tpu", "pod", "experiments/tiny.py")
    (cloud.folder / "vm").write_text("STOPPED")
    assert "is stopped" in said("--tpu", "pod", *bucket)
