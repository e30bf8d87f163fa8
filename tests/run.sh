#!/usr/bin/env bash
# All checks of the repository: lint, then pytest with the options given here (`-n 0`: in one
# process, which shows what a test prints and stops in pdb).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./path.sh
# Tests run beside each other; threads would only make all of them slower.
export OMP_NUM_THREADS=1

ruff check .
ruff format --check .
mapfile -t scripts < <(git ls-files -co --exclude-standard -- '*.sh' .ci/run | sort -u)
shellcheck -x "${scripts[@]}"
# What the tests of a file share is made once.
python3 -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
