# shellcheck shell=bash
# Functions that the launch scripts share. Sourcing this file changes to the repository's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "${0##*/}: $*" >&2; exit 2; }

# usage ARGUMENT SYNOPSIS [LINE...]: for -h and --help, print how to call the script, its first comment, and the lines.
usage() {
    [[ $1 == -h || $1 == --help ]] || return 0
    echo "./${0##*/} $2"
    sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "${0##*/}"
    printf '%s\n' "${@:3}"
    exit
}

# environment FILE...: set $python to one that has the packages of the requirements files: the active one if it has
# them all, else the one of .venv, which is made or updated if necessary.
environment() {
    python=$(command -v python || command -v python3 || true)
    if has_packages "$python" "$@"; then return; fi
    "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "Python 3.10 or newer with venv is missing; sudo apt-get install python3 python3-venv"
    # .venv/installed holds the lines of all requirements files that it was made from.
    if grep -qvxFf .venv/installed "$@" 2>/dev/null || ! has_packages .venv/bin/python "$@"; then
        echo "${0##*/}: installing the packages of $* into .venv: some GB, some minutes, this once" >&2
        [[ -e .venv/installed ]] || "$python" -m venv --clear .venv
        rm -f .venv/installed # an interrupted installation starts again from scratch
        .venv/bin/python -m pip install -qq --disable-pip-version-check "${@/#/--requirement=}" ||
            fail "pip could not install the packages of $*: see pip's output above, fix the problem, rerun"
        cat "$@" >.venv/installed
    fi
    python=.venv/bin/python
    PATH=$PWD/.venv/bin:$PATH # torch looks for ninja there
}

# has_packages PYTHON FILE...: whether it has all packages. They are looked up: importing them would take seconds.
has_packages() {
    "$1" - "${@:2}" 2>/dev/null <<'END'
import re, sys
from importlib.util import find_spec

names = [name for file in sys.argv[1:] for name in re.findall(r"^(?:pytest-)?(\w+)", open(file).read(), re.M)]
sys.exit(sys.version_info < (3, 10) or not all(map(find_spec, names)))
END
}

# launch SCRIPT CONFIG [N] [ARGUMENTS]: become the launcher of N ranks, by default one per GPU, or 2 CPU ranks. CONFIG is
# used when ARGUMENTS name no config; ${settings[@]} come before them.
# With HOSTFILE=FILE: on every host of that file, as many ranks as it says; ARGUMENTS may have options of launch.hosts.
launch() {
    local script=$1 config=$2 n='' argument
    shift 2
    if (($#)) && [[ $1 != --* && $1 != *.py ]]; then n=$1 && shift; fi
    for argument; do
        if [[ $argument == *.py && $argument != --* ]]; then config=''; fi
        if [[ $argument == --device=cpu ]]; then export CUDA_VISIBLE_DEVICES=''; fi
    done
    if [[ " $*" == *" --init_from=resume"* && " $*" == *" --out_dir="* ]]; then config=''; fi # that run's settings
    set -- "$script" ${settings[@]+"${settings[@]}"} ${config:+"$config"} "$@"
    if [[ ${HOSTFILE:-} ]]; then
        [[ -z $n ]] || fail "$n ranks: $HOSTFILE says how many, as slots=; leave the number out"
        exec "$python" -m launch.hosts --hostfile="$HOSTFILE" "$@"
    fi
    [[ -z $n || $n =~ ^[1-9][0-9]{0,4}$ ]] ||
        fail "$n ranks: must be a whole number, at least 1 (a config ends in .py, an option begins with --)"
    exec "$python" -m launch.ranks "${n:-auto}" "$@"
}
