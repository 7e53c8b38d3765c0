#!/usr/bin/env bash
# ./run_tests.sh [pytest's arguments]
#
# Lint, types and the tests: all of them, or those that the arguments name.

# shellcheck source=launch_common.sh
source "$(dirname "$0")/launch_common.sh"
usage "$@"

environment compiler libaio requirements.txt requirements-test.txt
unset PYTHONDONTWRITEBYTECODE                # hundreds of launches would each compile this code anew
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # most tests run 2 ranks of a tiny model: more threads only get in the way
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy .
exec "$python" -m pytest "$@"
