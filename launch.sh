#!/usr/bin/env bash
# The one entry point. Finds a Python and hands over to lab/bootstrap.py, which builds what is missing.
#
#   ./launch.sh experiments/gpt_small.py [flags]    train (see README.md for study, sample, eval, report, ...)
#   ./launch.sh tests [pytest arguments]            run the tests
#   ./launch.sh ruff check .                        run the linter
#   ./launch.sh prepare NAME [--data-dir D]         download and prepare a TensorFlow Datasets data set
#   ./launch.sh env [--python]                      say which environment is used (or only its Python)
set -euo pipefail
trap 'exit 130' INT    # until Python installs its own handlers; signals must not interrupt its start
trap 'exit 75' TERM USR1 USR2 XCPU HUP
hold=
if env --block-signal=INT true 2>/dev/null; then hold='env --block-signal=INT,TERM,USR1,USR2,XCPU,HUP'; fi    # GNU's

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do    # a loop, because `readlink -f` is missing on older macOS
  target=$(readlink "$self")
  case $target in
    /*) self=$target ;;
    *) self=$(dirname "$self")/$target ;;
  esac
done
root=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd -P)

suitable() {    # by running it: a pyenv shim can be on PATH for a version that is not switched on
  "$1" -ISc 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}
start() {       # -I, -S: ignore PYTHONPATH, the current folder and site-packages
  python=$1; shift
  exec $hold "$python" -IS "$root/lab/bootstrap.py" "$@"
}

for name in LAB_PYTHON PYTHON; do    # an environment that is there already; a Python to build one on
  if [ -n "${!name:-}" ]; then
    if suitable "${!name}"; then start "${!name}" "$@"; fi
    echo "lab: $name=${!name} does not run as Python 3.11, 3.12 or 3.13." >&2
    exit 2
  fi
done
# The Python of the last build, noted by bootstrap.py: trying names costs up to 0.5 s where they are pyenv shims.
noted=${LAB_ENVS:-$root/.venvs}/python
if [ -r "$noted" ] && read -r python <"$noted" && [ -x "$python" ]; then start "$python" "$@"; fi
for python in python3.13 python3.12 python3.11 python3; do
  if command -v "$python" >/dev/null && suitable "$python"; then start "$python" "$@"; fi
done
echo "lab: no Python 3.11, 3.12 or 3.13 was found; install one, or set PYTHON=/path/to/python." >&2
exit 2
