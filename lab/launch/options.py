"""Launch options, which come before the command. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lab.errors import UserError, nearest

ENGINES = ("--slurm", "--hosts", "--tpu", "--sky")
HELP = """\
Start a training run, or any other command of ./launch.sh, elsewhere. These options come before the command.

usage: ./launch.sh --slurm "SBATCH OPTIONS" [--detach] [--dry-run] experiments/x.py [flags]
       ./launch.sh --hosts HOST,HOST,...    [--dry-run] experiments/x.py [flags]
       ./launch.sh --tpu NAME [--zone ZONE] [--create v5e-16 [--spot]] [--detach] [--dry-run] experiments/x.py [flags]
       ./launch.sh --sky "SKY OPTIONS"      [--detach] [--dry-run] experiments/x.py [flags]

  --slurm OPTIONS   write an sbatch script and submit it; OPTIONS are sbatch's, such as
                    "--nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=4:00:00". One process per node, unless they say
                    otherwise. Before the time limit and on preemption the run saves, and the job is queued again.
                    A study becomes a job array: a worker for each node or task, which share the cells.
  --hosts HOSTS     one process per host by Open MPI's mpirun over ssh. A checkout that the hosts do not see is copied.
  --tpu NAME        one process per worker of the Cloud TPU VM of that name, by gcloud
    --zone ZONE     its zone (default: that of `gcloud config`)
    --create TYPE   request it first where it does not exist: v2-8, v3-8, v4-32, v5p-16, v5e-16, v6e-256, ...
    --spot          as a spot VM: cheaper, may be preempted; then it is requested again and the run continues
    --gcloud-flags FLAGS    for gcloud's ssh and scp, such as --tunnel-through-iap or --internal-ip
  --sky OPTIONS     write a SkyPilot task and launch it; OPTIONS are sky's, such as "--gpus tpu-v6e-8 --use-spot",
                    "--gpus H100:8 --num-nodes 2 --infra k8s", "--infra slurm/mycluster --cpus 8+"
  --detach          return once the job is submitted, without following its output (--slurm, --tpu, --sky)
  --dry-run         print every file and command, and do nothing (--slurm: the experiment's flags and sbatch's options
                    are checked as well, where an environment and SLURM are here)

Without --detach the output is followed. Ctrl-C then stops following and not the job (--hosts: it saves and stops).
The exit status is the run's: 0 finished, 75 saved and to be started again, 2 user error.
What is written is kept in the folder launch/ of the run folder, which is runs/NAME-HASH (of the experiment's file and
the flags) without --run-dir. Machines that share no disk, or may be preempted, need a bucket for checkpoints:
--checkpoint-dir gs://mine/x (LAB_EXTRAS=bucket is added). The run folder is then process 0's, which copies it to run/
in that bucket once a minute and at the end; --hosts and --tpu also bring it here at the end.
Variables that go along: LAB_ACCELERATOR, LAB_EXTRAS, JAX_PLATFORMS, XLA_FLAGS.
"""


@dataclass
class Options:
    """Parsed launch options. A field is None, False or "" if its option is absent."""

    slurm: str | None = None
    hosts: str | None = None
    tpu: str | None = None
    sky: str | None = None
    zone: str = ""
    create: str = ""
    spot: bool = False
    gcloud_flags: str = ""
    detach: bool = False
    dry_run: bool = False
    help: bool = False


FITS = {"zone": ("tpu",), "create": ("tpu",), "spot": ("tpu",), "gcloud_flags": ("tpu",),
        "detach": ("slurm", "tpu", "sky")}


def parse(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Splits a command line into launch options and command. argparse cannot take values such as `--nodes=2`.

    Raises:
      UserError: an option is unknown, lacks its value, or conflicts with another.
    """
    options, rest = Options(), list(words)
    while rest and rest[0].startswith("-"):
        flag, equals, value = rest.pop(0).partition("=")
        name = "help" if flag == "-h" else flag[2:].replace("-", "_")
        if name not in vars(options):
            known = ["--" + n.replace("_", "-") for n in vars(options)]
            others = f" The flags of the experiment come after its file; there are {', '.join(known)}."
            raise UserError(f"There is no option {flag} before the command.{nearest(flag, known, others, 0.75)}")
        if isinstance(getattr(options, name), bool):
            if equals:
                raise UserError(f"{flag} takes no value.")
            setattr(options, name, True)
            continue
        if not equals:
            if not rest or rest[0] in ENGINES or rest[0].endswith(".py"):
                if {"-h", "--help"} & set(words):
                    return Options(help=True), []
                raise UserError(f"{flag} needs a value; ./launch.sh {flag} --help explains it.")
            if rest[0] in ("-h", "--help"):
                return Options(help=True), []
            value = rest.pop(0)
        setattr(options, name, value)
    _check(options)
    if "--dry-run" in rest:  # at any position: it must never submit anything
        rest = [word for word in rest if word != "--dry-run"]
        options.dry_run = True
    return options, rest


def _check(options: Options) -> None:
    given = [flag for flag in ENGINES if getattr(options, flag[2:]) is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} exclude each other.")
    for name, engines in FITS.items():
        if getattr(options, name) and given and given[0][2:] not in engines:
            raise UserError(f"--{name.replace('_', '-')} does not go with {given[0]}, only with "
                            f"{', '.join('--' + e for e in engines)}.")
    if options.spot and not options.create:
        raise UserError("--spot goes with --create TYPE: it says how the TPU VM is requested.")
