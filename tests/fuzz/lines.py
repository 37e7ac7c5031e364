"""Command lines as a person, a script or a cat might type them: from a number, always the same ones.

A line begins as one that works: an experiment with some of its own flags, a command with its run folder, a study. Then
it is spoiled: a value of another kind or size, a flag with a typo, words that are missing, twice, or in another order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VALUES = (
    "", " ", "0", "1", "-1", "2", "3", "7", "-0", "1.5", "1e-3", "1e400", "-inf", "inf", "nan", "1_000", "0x10", "1,5",
    "01", "2147483647", "2147483648", str(2**63 - 1), str(2**63), str(2**64), str(10**30), "-" + "9" * 400, "1e18",
    "None", "none", "True", "false", "abc", "float32", "bfloat16", "layernorm", "min", "auto", "loss", "accuracy",
    "a,b", "1,2", "(1,2)", "[1]", "{}", "()", "''", '"', "'", "=", "--", "-", "%s", "{0}", "$HOME", "`id`", "\\",
    "\n", "\t", "é", "Ω", "🙂", "\udcff", "x" * 5000, ".", "..", "/", "~", "~nobody/x", "/dev/null", "no/such/file",
    "gs://bucket/run", "s3://b", "file://x", "experiments/gpt_char.py", "runs", "*", "**/*.txt", "(", "[a-", "^head",
    "+",
)
EXECUTION = ("loop", "vmap", "cores")


@dataclass(frozen=True)
class World:
    """What the lines may name: all of it exists."""

    experiments: Mapping[str, Mapping[str, Any]]
    """Experiment file -> its flags (without --) and their values."""
    studies: Sequence[str]
    """Experiment files that hold a study."""
    runs: Sequence[str]
    """Run folders."""
    folders: Sequence[str]
    """Study folders."""


class Lines:
    """Line `number` of a seed is always the same, whatever came before."""

    def __init__(self, world: World, seed: int = 0):
        self.world, self.seed = world, seed

    def line(self, number: int) -> list[str]:
        """The words after ./launch.sh."""
        self.dice = random.Random(f"{self.seed} {number}")
        words = self._pick([self._train] * 7 + [self._vary] * 4 + [self._run] * 3 + [self._launch] * 2 + [
            self._report, self._plan, self._bench, self._anything])()
        for _ in range(self.dice.choice((0, 0, 0, 0, 1, 1, 2))):
            words = self._pick((self._typo, self._drop, self._twice, self._swap, self._shuffle, self._insert,
                                self._join))(words)
        return words

    def _pick(self, options: Sequence[Any]) -> Any:
        return self.dice.choice(options)

    # ------------------------------------------------------------------------------------------- lines that may work

    def _train(self) -> list[str]:
        file = self._pick(list(self.world.experiments))
        return [file, *self._flags(file), *self._options(self._pick(("--local", "--local", "--full", ""))), "--dry-run"]

    def _vary(self) -> list[str]:
        file = self._pick([*self.world.experiments, *self.world.studies])
        known = self.world.experiments.get(file) or self._pick(list(self.world.experiments.values()))
        words = [file]
        for _ in range(self._pick((0, 1, 1, 1, 2, 2, 3))):
            path = self._pick([*known, *known, "data", "model", "optim", "task", "mesh", "evaluate", "init_from"])
            words += ["--vary", f"{path}={self._values(known.get(path))}"]
        words += self._some({"--seeds": (1, 2, 3), "--design": ("grid", "one_at_a_time"), "--metric": ("loss", "auc"),
                             "--mode": ("min", "max"), "--split": ("validation", "test"), "--only": ("base", "x"),
                             "--execution": EXECUTION, "--studies": ("none",)})
        return [*words, *self._options(self._pick(("--local", "--accept", "--rerun"))), "--dry-run"]

    def _run(self) -> list[str]:
        run = self._pick([*self.world.runs] * 4 + [*self.world.folders, ".", "no/run", "README.md", "/"])
        command = self._pick(("sample", "evaluate", "predict"))
        own = {"sample": {"--prompt": ("a", "the step"), "--new-tokens": (1, 5), "--temperature": (0.5,),
                          "--top-k": (3,), "--top-p": (0.9,), "--seed": (1,)},
               "evaluate": {"--records": (4,), "--split": ("validation", "test"), "--judge": tuple(self.world.runs)},
               "predict": {"--input": ("corpus.txt", "no.csv", "."), "--output": ("out.csv", "no/folder/out.csv")}}
        words = self._some(own[command] | {"--step": (2, 4)})
        return [command, run, *words, *self._options(self._pick(("", "--best")))]

    def _report(self) -> list[str]:
        folders = [self._pick([*self.world.folders, *self.world.folders, *self.world.runs, "no/study", "."])
                   for _ in range(self._pick((0, 1, 1, 2)))]
        return ["report", *folders, *self._options(self._pick(("", "--pool"))), *self._some({"--output": ("report",)})]

    def _plan(self) -> list[str]:
        file = self._pick(list(self.world.experiments))
        machine = self._pick(("cpu:1", "cpu:8", "v5e-8", "h100:8", "v9-1", "v5e-7", "cpu:0", *VALUES))
        return ["plan", file, "--on", machine, *self._flags(file)]

    def _bench(self) -> list[str]:
        file = self._pick(list(self.world.experiments))
        return ["bench", file, "--local", *self._flags(file), *self._some({"--timed-steps": (1, 5), "--steps": (1,)})]

    def _launch(self) -> list[str]:
        engine = self._pick(("--slurm", "--hosts", "--tpu", "--sky"))
        good = {"--slurm": ("--nodes=2 --gpus-per-node=8", "--ntasks 2", "--array=1-3", "-o x", '"'),
                "--hosts": ("h1,h2", "h1", "u@h1", "h1,h1"), "--tpu": ("name", "Name", "-x"),
                "--sky": ("--gpus H100:8", "--num-nodes 2 --infra k8s", "--use-spot", "--gpus")}[engine]
        own = self._some({"--zone": ("z",), "--create": ("v5e-16", "v9-1"),
                          "--gcloud-flags": ("--internal-ip", '"')}, 0.2)
        value = self._pick(good) if self.dice.random() < 0.7 else self._pick(VALUES)
        file = self._pick(list(self.world.experiments))
        return [engine, value, *own, *self._options(self._pick(("", "", "--spot", "--detach"))), "--dry-run", file,
                *self._flags(file), *self._some({"--checkpoint-dir": ("gs://mine/x",), "--run-dir": ("/x/y",)})]

    def _anything(self) -> list[str]:
        commands = ("sample", "evaluate", "predict", "report", "plan", "bench", "tests", "prepare", "env",
                    "--processes", "--help", "-h", "help", "--slurm", "--version", *self.world.experiments,
                    *self.world.runs)
        return [str(self._pick((*commands, *VALUES))) for _ in range(self._pick((0, 1, 1, 2, 3)))]

    # ------------------------------------------------------------------------------------------------------ their parts

    def _flags(self, file: str) -> list[str]:
        known = self.world.experiments[file]
        return self._some({f"--{name}".replace("_", "-"): (value, value) for name, value in self.dice.sample(
            sorted(known.items(), key=str), k=min(len(known), self._pick((0, 1, 1, 2, 3))))}, often=1.0)

    def _some(self, flags: Mapping[str, Sequence[Any]], often: float = 0.3) -> list[str]:
        """Some of the flags, each with one of its good values or with any other."""
        words: list[str] = []
        for flag, good in flags.items():
            if self.dice.random() < often:
                value = str(self._pick(good)) if self.dice.random() < 0.3 else self._pick(VALUES)
                words += self._pick(([flag, value], [f"{flag}={value}"], [flag, value], [flag]))
        return words

    def _options(self, *flags: str) -> list[str]:
        return [flag for flag in flags if flag]

    def _values(self, good: Any) -> str:
        return ",".join(str(good) if self.dice.random() < 0.3 else self._pick(VALUES)
                        for _ in range(self._pick((1, 1, 2, 2, 3))))

    # -------------------------------------------------------------------------------------------------------- mistakes

    def _typo(self, words: list[str]) -> list[str]:
        at = self.dice.randrange(-1, len(words))
        if at < 0 or not words[at]:
            return words
        word, place = words[at], self.dice.randrange(len(words[at]))
        start, rest = word[:place], word[place:]
        spoiled = self._pick((start + rest[1:], start + self._pick("abz-=._ ,1") + rest, start + rest[1::-1] + rest[2:],
                              word.upper(), start))
        return [*words[:at], spoiled, *words[at + 1:]]

    def _drop(self, words: list[str]) -> list[str]:
        at = self.dice.randrange(len(words) + 1)
        return words[:at] + words[at + 1:]

    def _twice(self, words: list[str]) -> list[str]:
        at = self.dice.randrange(len(words) + 1)
        return words[:at] + words[at:at + 1] * 2 + words[at + 1:]

    def _swap(self, words: list[str]) -> list[str]:
        at = self.dice.randrange(len(words) + 1)
        return words[:at] + words[at:at + 2][::-1] + words[at + 2:]

    def _shuffle(self, words: list[str]) -> list[str]:
        return self.dice.sample(words, k=len(words))

    def _insert(self, words: list[str]) -> list[str]:
        at = self.dice.randrange(len(words) + 1)
        word = self._pick((*VALUES, "--help", "--seed", "--full", "--local", "--no", "--model"))
        return [*words[:at], word, *words[at:]]

    def _join(self, words: list[str]) -> list[str]:
        at = self.dice.randrange(len(words) + 1)
        return words[:at] + ["=".join(words[at:at + 2])] * bool(words[at:at + 2]) + words[at + 2:]
