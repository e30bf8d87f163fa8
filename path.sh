# shellcheck shell=bash
# The environment, for `. ./path.sh`: makes .venv from requirements.lock on first use and
# when that file has changed, and puts it and this folder first. `python3` is then the
# recipe's own. MVQKD_PYTHON names another Python to make it with (3.11 or 3.12).

mvqkd_environment() {
    local root lock_hash python
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || return 1
    lock_hash=$(sha256sum <"$root/requirements.lock") || return 1
    if [[ "$(cat "$root/.venv/lock-hash" 2>/dev/null)" != "$lock_hash" ]]; then
        (
            flock 9
            [[ "$(cat "$root/.venv/lock-hash" 2>/dev/null)" != "$lock_hash" ]] || exit 0
            for python in ${MVQKD_PYTHON:-python3.11 python3.12 python3}; do
                "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
                    2>/dev/null && break
                python=''
            done
            if [[ -z $python ]]; then
                echo "path.sh: ${MVQKD_PYTHON:-python3} is no Python 3.11 or 3.12; install one," \
                    "or name it in MVQKD_PYTHON" >&2
                exit 1
            fi
            if [[ -L $root/.venv ]]; then
                echo "path.sh: .venv is a link, to an environment made from another" \
                    "requirements.lock; remove the link, and call again" >&2
                exit 1
            fi
            echo "path.sh: making .venv from requirements.lock with $python (once)" >&2
            "$python" -m venv --clear "$root/.venv" || exit 1
            # torch first: what else needs it then takes this build.
            if ! {
                grep '^torch==' "$root/requirements.lock" >"$root/.venv/torch.txt" &&
                    "$root/.venv/bin/pip" install --no-input -r "$root/.venv/torch.txt" &&
                    "$root/.venv/bin/pip" install --no-input -r "$root/requirements.lock"
            } >"$root/.venv/install.log" 2>&1; then
                tail -n 20 "$root/.venv/install.log" >&2
                echo "path.sh: the packages of requirements.lock could not be installed; see" \
                    "$root/.venv/install.log, mend what it names, and call again" >&2
                exit 1
            fi
            echo "$lock_hash" >"$root/.venv/lock-hash"
        ) 9>"$root/.venv.lock" || return 1
    fi
    export VIRTUAL_ENV="$root/.venv"
    export PATH="$root/.venv/bin:$PATH"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}

mvqkd_environment
