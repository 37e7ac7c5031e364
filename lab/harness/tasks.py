"""lm-eval's tasks: found by name, and loaded from its own downloads or from files on this machine."""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import cache_folder, replace_file
from lab.harness.local_data import Rows, read_local

MISSING = "--tasks needs the package lm-eval: LAB_EXTRAS=lm-eval ./launch.sh ..."


def check_package() -> None:
    """Raises UserError if lm-eval is not installed. Keeps its log and bars off the screen."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(MISSING) from None
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()


@functools.lru_cache(1)
def task_index() -> dict[str, Any]:
    """Name -> lm-eval's `Entry` of every task, group and tag. Reading 14,000 files takes 16 s, so it is done once and
    kept in the cache folder.
    """
    import importlib.metadata

    import lm_eval.tasks
    from lm_eval.tasks._index import Entry, Kind, TaskIndex

    root = Path(lm_eval.tasks.__file__).parent
    cache = cache_folder("lm-eval") / f"tasks-{importlib.metadata.version('lm-eval')}.json"
    try:
        kept = json.loads(cache.read_text("utf-8"))
        return {name: Entry(name, Kind[kind], path and root / path, None, set(tags))
                for name, (kind, path, tags) in kept.items()}
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
        pass
    found = TaskIndex.build([root])
    replace_file(cache, json.dumps({name: (e.kind.name, e.yaml_path and str(e.yaml_path.relative_to(root)),
                                           sorted(e.tags)) for name, e in found.items()}))
    return found


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for a name that is none of lm-eval's tasks, groups and tags; names the nearest."""
    known = task_index()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or sorted(n for n in known if n.startswith(name))[:1]
            raise UserError(f"lm-eval has no task {name!r}." + (f" Perhaps you meant {near[0]}." if near else ""))


def metric_names(names: Sequence[str]) -> list[str]:
    """What `numbers_of` names the results of these tasks, without their standard errors; reads no data."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
    from lm_eval.tasks._yaml_loader import load_yaml

    check_names(names)
    found: list[str] = []
    for name in names:
        entry = task_index()[name]
        if entry.kind.name == "TAG":
            found += metric_names(sorted(entry.tags))
            continue
        config = load_yaml(entry.yaml_path, resolve_func=False)
        if entry.kind.name == "GROUP":
            found += [named(name, m["metric"], "none") for m in _listed(config.get("aggregate_metric_list"))]
            children = [c if isinstance(c, str) else c.get("task") for c in _listed(config.get("task"))]
            found += metric_names([c for c in children if c in task_index()])
            continue
        metrics = [m["metric"] for m in config.get("metric_list") or ()] or DEFAULT_METRIC_REGISTRY.get(
            config.get("output_type"), [])
        filters = [f["name"] for f in config.get("filter_list") or ()] or ["none"]
        found += [named(name, metric, one) for metric in metrics for one in filters]
    return list(dict.fromkeys(found))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def named(task: str, metric: str, filtered: str) -> str:
    """blimp.acc, or gsm8k.exact_match,strict-match where the task has filters, which lm-eval names so."""
    return f"{task}.{metric}" + ("" if filtered == "none" else f",{filtered}")


def load_tasks(names: Sequence[str], data: Path | None) -> Any:
    """lm-eval's `TaskDict` of tasks and groups. `data`: a folder that is searched first, see `read_local`.

    Raises:
      UserError: an unknown name, or data that is neither there nor can be downloaded.
    """
    from lm_eval.tasks import TaskManager

    check_names(names)
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data} is no folder.")
    manager = TaskManager(include_defaults=False)
    manager._index, manager._factory = task_index(), _factory(data)
    return manager.load(list(dict.fromkeys(names)))


def _factory(folder: Path | None) -> Any:
    """lm-eval's `TaskFactory`, which gives tasks the data of a folder, and whose errors name what is missing."""
    from lm_eval.tasks._factory import TaskFactory

    class Factory(TaskFactory):
        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
            config = super()._load_full_config(entry, overrides)
            if folder is not None and isinstance(path := config.get("dataset_path"), str):
                rows = read_local(folder, path, config.get("dataset_name"))
                if rows is not None:
                    config["custom_dataset"] = lambda **_: _splits(rows, config)
                    config["dataset_kwargs"] = None
            return config

        def _build_task(self, entry: Any, overrides: Any) -> Any:
            try:
                return super()._build_task(entry, overrides)
            except (UserError, MemoryError):
                raise
            except ModuleNotFoundError as e:
                raise UserError(f"The task {entry.name} needs the package {e.name}, which is not installed.") from None
            except Exception as e:  # of any library that downloads or reads
                config = self._load_full_config(entry, overrides)
                raise UserError(_absent(entry.name, config, folder, e)) from None

    return Factory()


def _splits(rows: dict[str, Rows], config: dict[str, Any]) -> dict[str, Any]:
    """The splits that a task reads, as the `datasets` library holds them."""
    import datasets

    used = [config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    scored = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    shots = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split") or scored
    if "" in rows:  # one file is all of it
        if config.get("num_fewshot") and shots != scored:  # the examples would be the questions, with their answers
            raise UserError(f"The task {config['task']} takes its examples from the split {shots}, and --data has one "
                            f"file of {config['dataset_path']} without splits: give {scored}.jsonl and {shots}.jsonl "
                            f"in a folder {config.get('dataset_name')}.")
        whole = datasets.Dataset.from_list(rows[""])
        return {split: whole for split in used if split}
    if lacks := [split for split in [scored, *([shots] if config.get("num_fewshot") else [])] if split not in rows]:
        raise UserError(f"The task {config['task']} needs the split {lacks[0]}; --data has "
                        f"{', '.join(rows)} of {config['dataset_path']}.")
    return {split: datasets.Dataset.from_list(rows.get(split, [])) for split in used if split}  # it asks for all


def _absent(name: str, config: dict[str, Any], folder: Path | None, error: Exception) -> str:
    path, part = str(config.get("dataset_path")), config.get("dataset_name")
    reason = (str(error).strip().splitlines() or [""])[0][:120]
    if "custom_dataset" in config:
        return f"The files of {path} in --data {folder} do not fit the task {name} ({type(error).__name__}: {reason})."
    last = path.rsplit("/", 1)[-1]
    where = f"is not in --data {folder} and " if folder else ""
    file = f"{part}.jsonl or {part}/test.jsonl" if part else "test.jsonl"
    return (f"The data of the task {name} {where}cannot be downloaded ({type(error).__name__}: {reason}). Where there "
            f"is a network, download the data set {path}{f' ({part})' if part else ''} from huggingface.co, put its "
            f"files into DIR/{last}/ (such as {file}) and add --data DIR.")
