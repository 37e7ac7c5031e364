"""Time of a step by class of kernel, from a trace of JAX's profiler."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

# The first rule that fits decides: (class, searched in the kernel's name, in the operation's place in the program).
RULES = (
    ("attention", r"fmha|flash|sdpa|cudnn_generated", r"dot_product_attention"),
    ("collectives", r"nccl|all.?reduce|all.?gather", r""),
    ("products", r"gemm|cublas|cutlass|nvjet|xmma|wgmma|^dot|convolution|cudnn.*conv", r"dot_general|conv_general"),
    ("loss", r"", r"\bloss\b"),
    ("optimizer", r"", r"\boptimizer\b"),
    ("norm", r"", r"_norm\b|norm/"),
    ("embedding", r"", r"\bwte\b|\bwpe\b"),
    ("copies", r"(?i)memcpy|memset|^copy|transpose", r""),
)


def kernels_of(folder: Path) -> Counter[tuple[str, str]]:
    """(kernel, operation of the program) -> microseconds, on the first GPU; on CPUs, of the operations."""
    path = max(folder.rglob("perfetto_trace.json.gz"), key=lambda p: p.stat().st_mtime)
    with gzip.open(path) as file:
        events = json.load(file)
    events = events["traceEvents"] if isinstance(events, dict) else events
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events
             if e.get("ph") == "M" and e["name"] in ("thread_name", "process_name") and "name" in e.get("args", {})
             and e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M" and e["name"] == "process_name"}
    gpu = next((pid for pid, name in sorted(processes.items()) if "/device:GPU:" in name), None)
    found: Counter[tuple[str, str]] = Counter()
    for e in events:
        op = (e.get("args") or {}).get("hlo_op", "")
        if e.get("ph") != "X" or not (op or gpu is not None):
            continue
        # A GPU's other rows (modules, operations) say the same once more.
        if gpu is not None and not (e["pid"] == gpu and "Stream" in names.get((e["pid"], e.get("tid")), "")):
            continue
        found[e["name"], op] += e.get("dur", 0)
    return found


def classes_of(times: Mapping[tuple[str, str], float], program: str) -> Counter[str]:
    """Class -> microseconds. `program`: the compiled program's text, which says where each operation comes from."""
    places = dict(re.findall(r"%?([\w.-]+) = [^\n]*?op_name=\"([^\"]*)\"", program))
    found: Counter[str] = Counter()
    for (kernel, op), microseconds in times.items():
        place = places.get(op, "")
        found[next((name for name, by_kernel, by_place in RULES
                    if by_kernel and re.search(by_kernel, kernel) or by_place and re.search(by_place, place)),
                   "other")] += microseconds
    return found
