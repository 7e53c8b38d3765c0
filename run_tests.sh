#!/usr/bin/env bash
# Lint, types and the tests: all of them, those that the arguments name, or with --quick the core in two minutes. Needs
# Python and a C++ compiler. Tests that need another program are skipped where it is missing; the last lines list them
# and what to install. REQUIRE_ALL=yes makes a missing program a failure, as in CI.

source "$(dirname "$0")/launch/common.sh"
usage "${1:-}" "[--quick] [pytest's arguments]"

cxx=${CXX:-c++}
command -v "${cxx%% *}" >/dev/null || fail "no C++ compiler ($cxx); sudo apt-get install g++ python3-dev"
environment requirements.txt requirements-test.txt
unset PYTHONDONTWRITEBYTECODE                # hundreds of launches would each compile this code anew
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # most tests run 2 ranks of a tiny model: more threads only get in the way
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy .
(($#)) || "$python" -m tests.compile_ops >/dev/null 2>&1 & # DeepSpeed's C++ ops, before the tests that need them
exec "$python" -m pytest "$@"
