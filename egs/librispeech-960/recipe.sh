# shellcheck shell=bash disable=SC2034
# The paper's 960 hours: as 100 hours, with the other training parts.
. egs/librispeech-100/recipe.sh
name=librispeech-960
more_parts=""
train_parts="train-clean-100 train-clean-360 train-other-500"
