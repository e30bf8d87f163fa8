# shellcheck shell=bash disable=SC2034,SC2154,SC1090
# Free Spoken Digit Dataset: real people say digits.
options="split dl_dir"
split=${split:-take}
if [[ $split != take && $split != speaker ]]; then
    echo "$0: --split $split: not known; give take or speaker" >&2
    exit 1
fi
name=digits-$split
# conf/laptop: students, teacher and codebooks of a size for two cores.
scale=laptop
train_parts="train-clean-100"
pool_parts=""
dev_parts="dev-clean"
test_parts="test-clean"
# The embedded corpus's teacher, trained on, is made here unless --teacher names another.
teacher_init=egs/mini/teacher
