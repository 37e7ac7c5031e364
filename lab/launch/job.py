"""The job to launch, and helpers shared by all engines: files to copy, tools, quoting."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UserError
from lab.files import ROOT, make_folder, no_links

FORWARDED = ("LAB_ACCELERATOR", "LAB_EXTRAS", "JAX_PLATFORMS", "XLA_FLAGS")
# TPU VM images have only Python 3.10; `uv python install` puts python3.12 where launch.sh finds it. For bash.
BIN = 'export PATH="$HOME/.local/bin:$PATH"'
PREPARE = (f'{BIN}; [ -n "$PYTHON" ] || command -v python3.13 python3.12 python3.11 >/dev/null || '
           "{ python3 -m pip install -q --user uv && python3 -m uv python install 3.12; }; ./launch.sh env;")


@dataclass(frozen=True)
class Job:
    """A command for `python -m lab`, and the folders of its run and of the launcher's files."""

    words: tuple[str, ...]
    """The command, such as ("experiments/x.py", "--steps", "5", "--run-dir", "runs/x-0123abcd")."""
    run_dir: str
    """Its run folder on process 0's machine."""
    checkpoint_dir: str | None
    """Where checkpoints go, if not to the run folder: a path, or a bucket such as gs://mine/x."""
    name: str
    """Short name: letters, digits and hyphens."""
    local: Path
    """The run folder on this machine, at the same path; copied back if the run was on another machine."""
    file: Path | None
    """The experiment's file."""
    study: bool = False
    """Whether it is a study, whose processes run cells independently."""

    @property
    def folder(self) -> Path:
        """Folder for the launcher's own files."""
        return self.local / "launch"

    def make_folder(self) -> None:
        """Creates `folder`. Raises UserError if it is or contains a symbolic link."""
        no_links(make_folder(self.folder))

    @property
    def bucket(self) -> bool:
        """Whether the checkpoints go to a bucket."""
        return "://" in (self.checkpoint_dir or "")

    @property
    def add_bucket(self) -> str:
        """Advice for a user whose run needs a place that outlives its machines; a study takes no bucket."""
        if self.study:
            return "Add --studies with an absolute path on a disk that outlives them"
        return f"Add --checkpoint-dir with a bucket, such as --checkpoint-dir gs://mine/{self.name}"

    def elsewhere(self) -> tuple[str, ...]:
        """The command to run in a copy of the checkout on another machine.

        Raises:
          UserError: the experiment's file is outside the checkout.
        """
        if self.file is None:
            return self.words
        if not self.file.is_relative_to(ROOT):
            raise UserError(f"{self.file} is outside {ROOT}, which is what the other machine gets. Move it into "
                            f"{ROOT / 'experiments'}.")
        return tuple(str(self.file.relative_to(ROOT)) if w.endswith(".py") else w for w in self.words)


def make_job(words: Sequence[str], engine: str) -> Job:
    """The job for a command line such as ["experiments/x.py", "--steps", "5"].

    Without --run-dir the folder name is a hash of the experiment's file and flags, since the experiment's fingerprint
    needs JAX. So repeating a command resumes its run, and an edited experiment starts a new one.

    Raises:
      UserError: the command or the experiment is missing, or the run folder is a bucket.
    """
    if not words:
        raise UserError(f"Say what to start, such as ./launch.sh {engine} ... experiments/gpt_small.py")
    from lab.commands.arguments import check_run_dir, find_experiment

    scripts = [w for w in words[:2] if w.endswith(".py")]
    file = find_experiment(scripts[0]) if scripts else None
    stem = (file.stem if file else words[0]).replace("_", "-")
    content = file.read_bytes() if file else b""
    digest = hashlib.sha256(b"\0".join([content, *(w.encode() for w in words)])).hexdigest()[:8]
    name = f"{stem}-{digest}"
    check_run_dir(_value(words, "--run-dir"))
    trains = words[0].endswith(".py")
    study = trains and (_value(words, "--vary") is not None or bool(re.search(rb"^study\b.*=", content, re.M)))
    own = study and engine == "--slurm"  # a disk that all share: studies/ there, and runs/ for the launcher's files
    flag = "--studies" if study else "--run-dir"
    run_dir = None if own else _value(words, flag)
    if run_dir is None:
        run_dir = f"runs/{name}"
        words = [*words, flag, run_dir] if trains and not own else words
    checkpoints = _value(words, "--checkpoint-dir")
    return Job(tuple(words), run_dir, checkpoints, name, Path(run_dir).absolute(), file, study)


def _value(words: Sequence[str], flag: str) -> str | None:
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def tool(name: str, how: str) -> str:
    """The path of a program. Raises UserError, with install instructions `how`, if it is missing."""
    path = shutil.which(name)
    if path is None:
        raise UserError(f"{name} was not found on this machine: {how}")
    return path


def say(text: str) -> None:
    """Prints a line to stderr, since stdout belongs to the run."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def show(*commands: Sequence[str]) -> None:
    """Prints commands quoted for a shell."""
    for command in commands:
        print("+", shlex.join(command))


def forwarded(job: Job) -> dict[str, str]:
    """Environment variables to forward. Adds the extra that a checkpoint bucket needs, which is easily forgotten."""
    found = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    if job.bucket:
        extras = re.findall(r"[^,\s]+", found.get("LAB_EXTRAS", ""))
        found["LAB_EXTRAS"] = ",".join(dict.fromkeys([*extras, "bucket"]))
    return found


def exports(job: Job, end: str = "\n") -> str:
    """`export` commands for the forwarded variables, each followed by `end`."""
    return "".join(f"export {name}={shlex.quote(value)}{end}" for name, value in forwarded(job).items())


def split(text: str, flag: str) -> list[str]:
    """Splits an option's value like a shell. Raises UserError for an unclosed quote."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{flag} {text!r}: {e}.") from None


def tracked_files(job: Job) -> list[str]:
    """Paths, relative to the checkout, of existing tracked files and the experiment.

    Raises:
      UserError: not a git checkout.
    """
    try:
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    except OSError:
        raise UserError("git was not found; it says which files the other machine needs. Install git.") from None
    if listed.returncode:
        raise UserError(f"{ROOT} is not a git checkout, which lists the files to copy. Clone the project with git.")
    names = set(filter(None, listed.stdout.split("\0")))
    if job.file is not None:
        names.add(str(job.file.relative_to(ROOT)))
    return sorted(name for name in names if (ROOT / name).exists())


def pack(job: Job, *written: str) -> Path:
    """Writes launch/checkout.tar.gz and returns its path; `written`: files of launch/ to include."""
    import tarfile

    job.make_folder()
    path = job.folder / "checkout.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in tracked_files(job):
            archive.add(ROOT / name, arcname=name)
        for name in written:
            archive.add(job.folder / name, arcname=f"launch/{name}")
    return path


def commit() -> str:
    """The checkout's commit, with -dirty if modified; forwarded because copies have no .git."""
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
                          capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
