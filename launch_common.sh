# shellcheck shell=bash
# What the launch scripts share. They source it, and are then in the repository's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { echo "${0##*/}: $*" >&2; }

fail() {
    say "$@"
    exit 2
}

# usage [ARGUMENT]: -h and --help print the comment at the head of the script.
usage() {
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^$/ s/^# \{0,1\}//p' "${0##*/}"
        exit
    fi
}

# environment [compiler] [libaio] FILE...: sets $python to one that has the packages of the requirements files: the
# active one if it has all, else that of .venv, which is made if need be. "compiler": what builds C++ ops must be there,
# too; "libaio": what those that read and write NVMe disks are built with.
environment() {
    look_around "$@"
    if [[ $missing ]]; then
        fail "missing: $missing. Install with: $([[ $EUID == 0 ]] || echo "sudo ")apt-get install $apt"
    fi
    if [[ $python == .venv/bin/python ]]; then
        venv_is_whole || make_venv
        PATH=$PWD/.venv/bin:$PATH # torch looks for ninja there
    fi
}

# look_around [compiler] [libaio] FILE...: sets $python, $files, $base (what .venv is made with), $missing (from this machine, in
# words) and $apt (the same as Debian's packages). It changes nothing.
look_around() {
    local compiler='' libaio='' cxx=${CXX:-c++} headers
    if [[ ${1:-} == compiler ]]; then compiler=yes && shift; fi
    if [[ ${1:-} == libaio ]]; then libaio=yes && shift; fi
    files=("$@") missing='' apt=''
    python=$(command -v python || command -v python3 || true)
    base=$python
    if [[ $(lacking "$python") ]]; then
        python=.venv/bin/python base=.venv/bin/python
        venv_is_whole || find_base
    fi
    if [[ $compiler ]]; then
        command -v "${cxx%% *}" >/dev/null || need g++ g++
        headers=$("$base" -c 'import sysconfig; print(sysconfig.get_config_var("INCLUDEPY"))' 2>/dev/null) || true
        [[ -e $headers/Python.h ]] || need "Python headers" python3-dev
    fi
    if [[ $libaio ]]; then
        "${cxx%% *}" -include libaio.h -x c++ -fsyntax-only /dev/null 2>/dev/null || need libaio libaio-dev
    fi
}

# lacking PYTHON: which packages of $files it cannot import. They are looked for, not imported: that takes seconds.
lacking() {
    "$1" - "${files[@]}" 2>/dev/null <<'END' || echo Python
import re, sys
from importlib.util import find_spec

assert sys.version_info >= (3, 10)
names = [name for file in sys.argv[1:] for name in re.findall(r"^(?:pytest-)?(\w+)", open(file).read(), re.M)]
print(*[name for name in names if not find_spec(name)])
END
}

# A finished .venv holds a copy of every requirements file that it was made from.
venv_is_whole() {
    local file
    for file in "${files[@]}"; do
        cmp -s "$file" ".venv/$file" || return 1
    done
    [[ ! -e .venv/unfinished && -z $(lacking .venv/bin/python) ]]
}

find_base() {
    for base in python python3; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            "$base" -c 'import ensurepip, venv' 2>/dev/null || need "Python's venv module" python3-venv
            return
        fi
    done
    need "Python 3.10 or newer" "python3 python3-venv"
}

need() { # WORDS PACKAGES
    missing+=${missing:+, }$1
    apt+=${apt:+ }$2
}

make_venv() {
    mkdir -p .venv
    (
        exec 9<.venv
        if command -v flock >/dev/null; then flock 9; fi # two first starts at once: the second waits for the first
        if venv_is_whole; then exit; fi
        say "installing the packages of ${files[*]} into .venv: some GB and some minutes, this once"
        if [[ -e .venv/unfinished ]]; then
            "$base" -m venv --clear .venv
        elif ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            "$base" -m venv .venv
        fi
        touch .venv/unfinished
        .venv/bin/python -m pip install -qq --disable-pip-version-check "${files[@]/#/--requirement=}" ||
            fail "pip could not install the packages of ${files[*]}: its words above say why; mend that, start again"
        cp "${files[@]}" .venv
        rm .venv/unfinished
    )
}

# How many GPUs this process may use. nvidia-smi is asked because importing torch takes seconds.
gpus() {
    local found=0 listed visible
    if command -v nvidia-smi >/dev/null; then
        if listed=$(nvidia-smi -L 2>&1); then
            found=$(grep -c '^GPU ' <<<"$listed" || true)
        else
            say "nvidia-smi finds no GPU: $listed"
        fi
    fi
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^ *([0-9]|GPU-|MIG-)' || true)
        if ((visible < found)); then found=$visible; fi
    fi
    echo "$found"
}

# ranks [N]: prints N, or one for every GPU, or 2 CPU ranks (1 on a Mac, whose one GPU takes no second rank).
ranks() {
    local n=${1:-} visible
    [[ -z $n || $n =~ ^[1-9][0-9]{0,4}$ ]] ||
        fail "$n ranks: must be a whole number from 1 on (a config ends in .py, an option begins with --)"
    visible=$(gpus)
    if ((visible)); then
        ((${n:=$visible} <= visible)) ||
            fail "$n GPUs wanted, $visible visible: ask for $visible at most, or leave the number out"
    else
        if [[ -z $n ]]; then n=2 && [[ $(uname) != Darwin ]] || n=1; fi
        say "no GPU here, so ranks on the CPU: $n"
    fi
    echo "$n"
}

# launch SCRIPT CONFIG [N] [ARGUMENTS]: becomes the launcher of N ranks; CONFIG is for when ARGUMENTS name none. What
# is in $setting stands before them. HOSTFILE=FILE: on every host of that file, as many ranks as it says.
launch() {
    local script=$1 config=$2 n='' argument hosts=() rest=()
    shift 2
    if [[ ${HOSTFILE:-} ]]; then
        for argument; do
            case $argument in
                --restarts=* | --include=* | --exclude=* | --ssh=* | --master_*=*) hosts+=("$argument") ;;
                --*) rest+=("$argument") ;;
                *.py) rest+=("$argument") && config='' ;;
                *) fail "$argument ranks: $HOSTFILE says how many, as slots=; leave the number out" ;;
            esac
        done
        exec "$python" launch_hosts.py --hostfile="$HOSTFILE" ${hosts[@]+"${hosts[@]}"} \
            "$script" ${setting:+"$setting"} ${config:+"$config"} ${rest[@]+"${rest[@]}"}
    fi
    if (($#)) && [[ $1 != --* && $1 != *.py ]]; then n=$1 && shift; fi
    for argument; do
        case $argument in
            --device=cpu) export CUDA_VISIBLE_DEVICES='' ;;
            --*) ;;
            *.py) config='' ;;
        esac
    done
    n=$(ranks "$n")
    exec "$python" launch.py "$n" "$script" ${setting:+"$setting"} ${config:+"$config"} "$@"
}

# launch_deepspeed STRATEGY [N] [ARGUMENTS]: the whole of a launch_deepspeed_*.sh.
launch_deepspeed() {
    local strategy=$1 setting=--deepspeed_config=deepspeed_configs/$1_config.json
    shift
    usage "$@"
    case $strategy in
        *_nvme) environment compiler libaio requirements.txt ;;
        *_offload) environment compiler requirements.txt ;;
        *) environment requirements.txt ;;
    esac
    launch train_deepspeed.py "config/train_gpt2_deepspeed_$strategy.py" "$@"
}
