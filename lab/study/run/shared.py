"""Data and compiled programs shared by the cells of a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from lab.configuration.values import digest, to_json
from lab.experiment import Experiment
from lab.study.run.grouping import program_key
from lab.study.run.stacked import Stacked, common_dispatch
from lab.train import loop
from lab.train.program import Program

SMALL_BYTES = 1 << 29
KEPT = 2  # programs: the running one and the next one


class Bench:
    """Provides data and programs to consecutive units. Holds one data set and the most recently used programs."""

    def __init__(self, stops: Sequence[int] = ()) -> None:
        """`stops`: steps at which a call must end, because arms fork from the state there."""
        self.stops = tuple(stops)
        self._data: tuple[str, Any] = ("", None)
        self._programs: dict[str, Future] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def data(self, experiment: Experiment) -> Any:
        """The experiment's data, loaded. Raises UserError."""
        key = digest(to_json(experiment.data))
        if self._data[0] != key:
            self._programs.clear()  # frees the old data before loading the new
            self._data = ("", None)
            self._data = (key, experiment.data.load())
        return self._data[1]

    def _program(self, key: str, make: Callable[[], Any]) -> Any:
        """The cached result of `make`, which runs in another thread."""
        if key not in self._programs:
            while len(self._programs) >= KEPT:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = self._compiler.submit(make)
        self._programs[key] = found = self._programs.pop(key)  # most recently used last
        return found

    def _run(self, experiment: Experiment, steps_per_call: int) -> Experiment:
        """The experiment as executed: several steps per call, small data on the device."""
        arrays = getattr(self.data(experiment).train, "arrays", {})
        small = experiment.data_on_device == "auto" and 0 < sum(x.nbytes for x in arrays.values()) < SMALL_BYTES
        return replace(experiment, steps_per_call=common_dispatch(experiment, steps_per_call, self.stops),
                       data_on_device="always" if small and experiment.parallel == "jit" else experiment.data_on_device)

    def _alone(self, experiment: Experiment, numbers: Sequence[str], steps_per_call: int) -> Future:
        run, train = self._run(experiment, steps_per_call), self.data(experiment).train

        def make() -> Program:
            program = Program(run, train, numbers=numbers)
            _ = program.compiled
            return program

        return self._program(program_key(run, numbers), make)

    def _together(self, experiments: Sequence[Experiment], numbers: Sequence[str], steps_per_call: int) -> Future:
        runs, train = [self._run(e, steps_per_call) for e in experiments], self.data(experiments[0]).train

        def make() -> Stacked:
            stacked = Stacked(runs, numbers, train)
            _ = stacked.compiled
            return stacked

        return self._program(digest([[to_json(e) for e in runs], list(numbers)]), make)

    def prepared(self, experiment: Experiment, numbers: Sequence[str] = (), steps_per_call: int = 1) -> loop.Shared:
        """Data and program; the first cell of a group compiles it. Raises UserError."""
        program = self._alone(experiment, numbers, steps_per_call).result()
        wanted = self._run(experiment, steps_per_call)
        return loop.Shared(self.data(experiment), program if program.experiment == wanted else program.like(wanted))

    def stacked(self, experiments: Sequence[Experiment], numbers: Sequence[str], steps_per_call: int) -> Stacked:
        """The compiled program that runs several cells at once. Raises UserError."""
        return self._together(experiments, numbers, steps_per_call).result()

    def ahead(self, experiments: Sequence[Experiment], numbers: Sequence[str], steps_per_call: int,
              together: bool) -> None:
        """Starts compiling the next program, if it uses the current data."""
        if digest(to_json(experiments[0].data)) == self._data[0]:
            (self._together(experiments, numbers, steps_per_call) if together else
             self._alone(experiments[0], numbers, steps_per_call))

    def compiling(self) -> bool:
        """Whether a compilation is running; a normal process exit would wait for it."""
        return any(not found.done() for found in self._programs.values())

    def close(self) -> None:
        """Cancels pending compilations."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
