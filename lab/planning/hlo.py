"""Parses HLO text for the data that a compiled program moves: collectives between devices and memory traffic.

Loop bodies are multiplied by their trip count; XLA's own cost analysis counts them once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Operations that move no data, or whose traffic is counted in the computation that they call.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
        "iota", "opt-barrier", "while", "conditional", "call", "async-start"}
SLICES = {"dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"}  # read only what they return

_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
                     r"(\{[^}]*\}|%?[\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,<=]*)\](?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Instruction:
    """An HLO instruction: one line of a computation."""

    name: str
    opcode: str
    shape: str
    """As printed: arrays with their layouts, `(a, b)` for a tuple."""
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of the called computations; role: "body", "condition", "calls", "to_apply", or a branch.
        """
        return [(role, name) for role, names in _CALLED.findall(self.attributes)
                for name in re.findall(r"[\w.\-]+", names)]


@dataclass
class Computation:
    """An HLO computation: a sequence of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in reversed(self.instructions.values()) if i.root)

    def shape(self, name: str) -> str:
        """The printed shape of the instruction `name`; "" if unknown."""
        return self.instructions[name].shape if name in self.instructions else ""

    def constant(self, name: str) -> int | None:
        """The value of the instruction `name` if it is an integer constant."""
        instruction = self.instructions.get(name)
        value = re.match(r"(\d+)\)", instruction.attributes) if instruction else None
        return int(value[1]) if value and instruction.opcode == "constant" else None

    def operand_bytes(self, instruction: Instruction, *, memory: bool = False) -> int:
        """Bytes of all operands; see `bytes_of`."""
        return sum(bytes_of(self.shape(name), memory=memory) for name in instruction.operands)


def bytes_of(shape: str, *, memory: bool = False) -> int:
    """Bytes of a printed shape, summed over a tuple; with `memory`, only of arrays in the device's main memory.

    The layout of arrays in on-chip memory names another memory space, ``S(1)``.
    """
    total = 0
    for letters, bits, dimensions, layout in _ARRAY.findall(shape):
        if memory and re.search(r"S\([1-9]", layout):
            continue
        width = int(bits) if bits else {"pred": 8}.get(letters, 0)  # tokens and opaque values have no size
        numbers = [int(d.replace("<=", "")) for d in dimensions.split(",") if d]
        total += math.prod(numbers) * width // 8
    return total


@dataclass(frozen=True)
class Collective:
    """One collective operation between devices."""

    name: str
    kind: str
    """One of `KINDS`."""
    times: int
    """Executions per run of the program."""
    bytes: int
    """Bytes of the whole array: the output of an all-gather, the input of any other collective."""
    group: int
    """Devices in a replica group."""

    @property
    def sent(self) -> int:
        """Bytes that one device sends per run of the program, with the optimal ring algorithm (Thakur 2005)."""
        share = {"all-reduce": 2 * (self.group - 1) / self.group, "collective-permute": 1.0}
        return round(self.times * self.bytes * share.get(self.kind, (self.group - 1) / self.group))


class HloModule:
    """A parsed HLO module."""

    def __init__(self, text: str):
        """`text`: the result of ``jax.stages.Compiled.as_text()``."""
        self.devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:200_000]))
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if start := _COMPUTATION.match(line):
                current = self.computations[start[2]] = Computation(start[2])
                self.entry = start[2] if start[1] else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _parse(found[2], found[3], bool(found[1]))
                if instruction is not None:
                    current.instructions[instruction.name] = instruction
        self.runs: dict[str, int] = {}
        self.fused: dict[str, str] = {}
        """Fused computation -> the computation that contains its fusion instruction."""
        self._count(self.entry, 1, "")

    def _count(self, name: str, times: int, inside: str) -> None:
        """Counts the executions of each computation. Counts every branch of a conditional, although only one runs."""
        self.runs[name] = self.runs.get(name, 0) + times
        if inside:
            self.fused[name] = inside
        for instruction in self.computations[name].instructions.values():
            for role, called in instruction.called():
                if called not in self.computations:
                    continue
                trips = self.trips(self.computations[name], instruction) if role in ("body", "condition") else 1
                inner = instruction.opcode not in ("while", "conditional", "call", "async-start")
                self._count(called, times * trips, (inside or name) if inner else inside)

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """Trip count of a while loop in `computation`: the compiler's annotation, else derived from the loop counter.

        Assumes a counter with a constant step, from its initial value (0 if not constant) to the condition's bound.
        """
        if known := re.search(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)', loop.attributes):
            return int(known[1])
        called = dict(loop.called())
        condition, body = self.computations[called["condition"]], self.computations[called["body"]]
        bound = max((condition.constant(name) or 0 for name in condition.instructions), default=0)
        read = next((i for i in condition.instructions.values() if i.opcode == "get-tuple-element"), None)
        start, step = 0, 1
        if read is not None:
            index = int(re.search(r"index=(\d+)", read.attributes)[1])
            first = computation.instructions.get(loop.operands[0])
            if first is not None and first.opcode == "tuple":
                start = computation.constant(first.operands[index]) or 0
            counter = body.instructions.get(body.root.operands[index]) if body.root.opcode == "tuple" else None
            if counter is not None and counter.opcode == "add":
                step = next((n for n in map(body.constant, counter.operands) if n), 1)
        return max(-(-(bound - start) // step), 1)

    def collectives(self) -> list[Collective]:
        """All collectives. A start/done pair counts once, and so does a collective split over several fusions."""
        found: dict[tuple[str, str], Collective] = {}
        for computation in self.computations.values():
            runs = self.runs.get(computation.name, 0)
            for instruction in computation.instructions.values() if runs else ():
                kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
                if kind not in KINDS:
                    continue
                group = group_size(instruction.attributes, self.devices)
                size = computation.operand_bytes(instruction) * (group if kind == "all-gather" else 1)
                if kind == "all-reduce" and self._scattered(computation):
                    kind = "reduce-scatter"
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                outer = self.fused.get(computation.name)
                key = (outer, channel[1]) if outer and channel else (computation.name, instruction.name)
                if group > 1:
                    found.setdefault(key, Collective(instruction.name, kind, runs, size, group))
        return list(found.values())

    def _scattered(self, computation: Computation) -> bool:
        """Whether an all-reduce is a reduce-scatter, printed on TPUs as an all-reduce fused with a device's slice."""
        return computation.name in self.fused and any(i.opcode == "dynamic-slice"
                                                      for i in computation.instructions.values())

    def traffic(self) -> int:
        """Bytes that one run of the program reads from and writes to one device's memory.

        An operation reads its operands and writes its result. A slice counts only the sliced part, an in-place update
        only the written rows. This is an upper estimate, because cached reads count too.
        """
        return sum(self.runs[c.name] * sum(self._moved(c, i) for i in c.instructions.values())
                   for c in self.computations.values() if self.runs.get(c.name) and c.name not in self.fused)

    def _moved(self, computation: Computation, instruction: Instruction) -> int:
        opcode, result = instruction.opcode, bytes_of(instruction.shape, memory=True)
        if opcode in FREE or opcode.endswith("-done") or 'target="AllocateBuffer"' in instruction.attributes:
            return 0
        if opcode == "fusion":
            inner = self.computations[dict(instruction.called())["calls"]]
            read = sum(self._read(inner, i, bytes_of(computation.shape(name), memory=True))
                       for i, name in enumerate(instruction.operands))
            return read + sum(self._written(inner, inner.root.name, part, i)
                              for i, part in enumerate(tuple_parts(instruction.shape)))
        if opcode in SLICES and opcode.endswith("-start"):  # its result is a tuple that includes its operands
            part = tuple_parts(instruction.shape)[len(instruction.operands)]
            return bytes_of(part) + bytes_of(part, memory=True)
        if opcode in SLICES:
            return 2 * result
        if opcode in ("dynamic-update-slice", "scatter"):
            rows = [bytes_of(computation.shape(name), memory=True) for name in instruction.operands[1:]]
            return 2 * (rows[0] if opcode == "dynamic-update-slice" else rows[-1])
        if opcode == "copy-start":
            return sum(bytes_of(part, memory=True) for part in tuple_parts(instruction.shape)[:2])
        read = computation.operand_bytes(instruction, memory=True)
        # The result of a start is a tuple that includes its operands, so the write is taken equal to the read.
        return 2 * read if opcode.endswith("-start") else read + result

    def _read(self, fused: Computation, number: int, size: int) -> int:
        """Bytes of operand `number`, of `size` bytes, that a fusion reads."""
        parameter = next((i.name for i in fused.instructions.values()
                          if i.opcode == "parameter" and i.attributes.startswith(f"{number})")), None)
        return min(size, self._used(fused, parameter, size)) if size and parameter else 0

    def _used(self, fused: Computation, name: str, size: int) -> int:
        total = 0
        for user in fused.instructions.values():
            if name not in user.operands:
                continue
            place = user.operands.index(name)
            if user.opcode == "bitcast":
                total += self._used(fused, user.name, size)
            elif user.opcode in SLICES and place == 0:
                total += bytes_of(user.shape)
            elif user.opcode == "fusion":
                total += self._read(self.computations[dict(user.called())["calls"]], place, size)
            elif not (user.opcode == "dynamic-update-slice" and place == 0):
                return size
        return total

    def _written(self, fused: Computation, name: str, shape: str, number: int = 0) -> int:
        """Bytes that a fusion writes for its result `number`, of printed shape `shape`, found in instruction `name`."""
        root, size = fused.instructions[name], bytes_of(shape, memory=True)
        if root.opcode in ("tuple", "bitcast"):
            for inside in root.operands:  # an operand may itself be a tuple
                parts = len(tuple_parts(fused.shape(inside)))
                if number < parts:
                    return self._written(fused, inside, shape, number)
                number -= parts
        if root.opcode == "fusion":
            inner = self.computations[dict(root.called())["calls"]]
            return self._written(inner, inner.root.name, shape, number)
        if root.opcode == "dynamic-update-slice" and size:
            return min(size, bytes_of(fused.shape(root.operands[1])))
        return size


def _parse(name: str, rest: str, root: bool) -> Instruction | None:
    """`rest`: shape, opcode, operands, attributes. Attributes include a constant's value and a parameter's number."""
    shape, rest = _balanced(rest) if rest.startswith("(") else (rest.partition(" ")[0], rest.partition(" ")[2])
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return None
    if opcode[1] in ("constant", "parameter"):
        return Instruction(name, opcode[1], shape, (), rest[opcode.end():], root)
    inner, attributes = _balanced(rest[opcode.end() - 1:])
    operands = tuple(re.findall(r"%([\w.\-]+)", inner)) or tuple(re.findall(r"([\w.\-]+)(?:,|$)", inner[1:-1]))
    return Instruction(name, opcode[1], shape, operands, attributes, root)


def _balanced(text: str) -> tuple[str, str]:
    """Splits `text` after the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end():].lstrip()
    return text, ""


def tuple_parts(shape: str) -> list[str]:
    """The printed shapes in a printed (flat) tuple."""
    return [match[0] for match in _ARRAY.finditer(shape)]


def group_size(attributes: str, devices: int) -> int:
    """Devices in one replica group of a collective, for all printed forms of XLA."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A group may use part of an axis: 'x':(2)4 is 4 of its devices.
        return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return pairs[1].count("{")
    return devices


def totals(collectives: list[Collective]) -> dict[str, tuple[int, int, int]]:
    """kind -> (operations, bytes of their arrays, bytes sent per device), per run of the program."""
    same = {kind: [c for c in collectives if c.kind == kind] for kind in KINDS}
    return {kind: (sum(c.times for c in some), sum(c.times * c.bytes for c in some), sum(c.sent for c in some))
            for kind, some in same.items() if some}
