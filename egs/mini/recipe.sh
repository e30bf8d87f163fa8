# shellcheck shell=bash disable=SC2034,SC2154,SC1090
# The embedded corpus.
options="size"
size=${size:-small}
if [[ ! -f egs/mini/conf/$size/corpus.yaml ]]; then
    echo "$0: --size $size: not known; give smoke, small, full or large" >&2
    exit 1
fi
name=mini-$size
# conf/laptop: students, teacher and codebooks of a size for two cores. Size large, for a GPU, has
# those of conf/.
scale=laptop
[[ $size != large ]] || scale=""
train_parts="train-clean-100"
pool_parts="train-clean-360 train-other-500"
dev_parts="dev-clean dev-other"
test_parts="test-clean test-other"
# Made by `--train-teacher true --size full`; its origin.json says how. Size large trains its own.
[[ $size == large ]] || teacher=${teacher:-mini}
