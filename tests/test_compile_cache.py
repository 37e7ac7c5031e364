"""The folder of compiled programs stays below its limit, and keeps what was used last."""

import os
from pathlib import Path

from lab.environment import accelerator, compile_cache
from lab.environment.compile_cache import prune


def filled(folder: Path, number: int = 10) -> list[Path]:
    """Files of 100 bytes in two folders, each a day younger than the one before."""
    paths = [folder / f"cpu-{i % 2}" / f"program-{i}-cache" for i in range(number)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (86400 * i, 86400 * i))
    return paths


def test_the_oldest_go_first_down_to_a_part_of_the_limit(tmp_path):
    paths = filled(tmp_path)
    os.utime(paths[0], (86400 * 99, 0))  # written first, used last
    assert prune(tmp_path, 1_000) == 0 and all(path.exists() for path in paths)
    assert prune(tmp_path, 500) == 0, "it looked a moment ago"
    assert prune(tmp_path, 500, seconds=0) == 6
    assert [path.exists() for path in paths] == [True] + [False] * 6 + [True] * 3
    assert prune(tmp_path / "nowhere", 1) == 0


def test_only_the_launchers_own_folder_is_pruned(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "CACHE", tmp_path)
    monkeypatch.setattr(compile_cache.prune, "__defaults__", (0, 0.0))
    paths = filled(tmp_path / "xla")
    for chosen in (str(tmp_path / "mine"), None):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen or "")
        compile_cache.prune_ours()
        assert all(path.exists() for path in paths)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla" / "cpu-0" / "one-core"))
    compile_cache.prune_ours()
    assert not any(path.exists() for path in paths)
