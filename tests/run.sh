#!/usr/bin/env bash
# All checks of the repository: lint, then pytest with the options given here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./path.sh
# Tests compare numbers and run beside each other; threads would only make both slower.
export OMP_NUM_THREADS=1

ruff check .
ruff format --check .
mapfile -t scripts < <(git ls-files -co --exclude-standard -- '*.sh' .ci/run | sort -u)
shellcheck -x "${scripts[@]}"
python3 -m pytest "$@"
