"""Downloads a TensorFlow Datasets data set and writes it as ArrayRecord, which lab reads without TensorFlow.

`./launch.sh prepare NAME` runs this by path, in a separate environment with TensorFlow; nothing in lab imports it.
"""

from __future__ import annotations

import argparse
import os
import sys


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="launch.sh prepare", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="data set, for example mnist, imdb_reviews or glue/sst2")
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    parser.add_argument("--data-dir", default=default, help="where prepared data goes (default: %(default)s)")
    parser.add_argument("--manual-dir", help="folder with the official files: used instead of downloads")
    options = parser.parse_args(arguments)
    options.data_dir = os.path.abspath(os.path.expanduser(options.data_dir))
    if options.manual_dir:
        options.manual_dir = os.path.abspath(os.path.expanduser(options.manual_dir))
        if not os.path.isdir(options.manual_dir):
            parser.error(f"--manual-dir {options.manual_dir} is not a folder")
    return options


def prepare(name: str, data_dir: str, manual_dir: str | None) -> str:
    """Write the data set below `data_dir` unless it exists. Returns its folder and the sizes of its splits."""
    import tensorflow_datasets as tfds  # imported here, so that --help works without it

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    lines = [f"{builder.info.full_name} is in {builder.data_path}"]
    for split, info in builder.info.splits.items():
        lines.append(f"  {split:<14}{info.num_examples:>12,} records{info.num_bytes / 1e6:>12,.1f} MB")
    return "\n".join(lines)


def main() -> None:
    """Prepares one data set and prints its folder."""
    options = parse()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")    # hide its notes on CPU features
    try:
        print(prepare(options.name, options.data_dir, options.manual_dir))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:    # TFDS builders raise any exception: wrong name, bad file, no network
        print(f"lab: could not prepare {options.name}: {explain(error)}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str:
    """The error message in a few lines: TFDS appends hundreds of names to some messages."""
    noise = ("\t- ", "Available datasets:")
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(noise)]
    lines = lines or [type(error).__name__]
    text = "\n".join(lines[:8])
    if isinstance(error, OSError):    # all download errors are OSErrors
        text += "\nA file that is already here can be used with --manual-dir FOLDER, under its official name."
    return text


if __name__ == "__main__":
    main()
