#!/usr/bin/env bash
# The transducer losses against k2 itself, on random problems that are new in each run, and the
# search that k2 does.
#
#     tests/k2/run.sh [options of pytest]
#
# k2 comes from PyPI, whose last one is for torch 1.13 and Python 3.11 at most, in an environment
# of its own (3.5 GB in .venv-k2; made anew when requirements.txt has changed), by python3.11 or
# else python3.10. Exit 3: there is neither, or none that can make environments (Debian's without
# python3.11-venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=.venv-k2
requirements=tests/k2/requirements.txt
if ! cmp -s "$requirements" "$venv/requirements.txt"; then
    python=
    for candidate in python3.11 python3.10; do
        # pyenv's may be there and not start; Debian's has venv without the ensurepip that it needs.
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [[ -z $python ]]; then
        echo "$0: no Python 3.11 or 3.10 with ensurepip, which k2 needs: the losses are not" \
            "compared with k2 itself; install it (on Debian python3.11-venv), or see tests/losses" \
            "for the comparison with k2's recorded values" >&2
        exit 3
    fi
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$venv/requirements.txt"
fi
export OMP_NUM_THREADS=1
"$venv/bin/python" -m pytest --noconftest -o addopts= -q "$@" tests/k2/compare_with_k2.py \
    tests/k2/fast_beam_search.py
