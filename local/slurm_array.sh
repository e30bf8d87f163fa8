#!/usr/bin/env bash
# Run a command as the tasks of a Slurm array, which share its work, and wait for them.
#
#     local/slurm_array.sh NUM_TASKS [SBATCH OPTION...] -- COMMAND...
#     local/slurm_array.sh 16 --partition=gpu --gpus-per-task=1 -- \
#         python3 local/dump_labels.py --teacher ...
#
# A task that is killed loses the shard that it has in hand; the same call again does what is
# left, with any number of tasks. What the tasks say is in exp/slurm/.
set -euo pipefail
caller=$PWD
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    echo "$0: $1; call it as $0 NUM_TASKS [SBATCH OPTION...] -- COMMAND..." >&2
    exit 1
}

num_tasks=${1:-}
[[ $num_tasks =~ ^[1-9][0-9]*$ ]] || usage "'$num_tasks' is no number of tasks"
shift
options=()
while (($# > 0)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
(($# > 1)) || usage "no command after --"
shift
if ! command -v sbatch >/dev/null; then
    echo "$0: sbatch is not here; run this where Slurm is, or use torchrun" >&2
    exit 1
fi

logs=$recipe/exp/slurm
mkdir -p "$logs"
status=0
sbatch --wait --array="0-$((num_tasks - 1))" --output="$logs/%A_%a.log" "${options[@]}" <<EOF || status=$?
#!/usr/bin/env bash
. ${recipe@Q}/path.sh
cd ${caller@Q}
exec ${@@Q}
EOF
if ((status != 0)); then
    echo "$0: a task failed, see $logs; call again to do what is left" >&2
    exit "$status"
fi
