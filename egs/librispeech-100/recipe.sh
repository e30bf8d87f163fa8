# shellcheck shell=bash disable=SC2034,SC2154,SC1090
# The paper's 100 hours: settings as published, in conf/.
name=librispeech-100
options="dl_dir"
make_corpus=egs/librispeech-100/make_corpus.py
train_parts="train-clean-100"
pool_parts=""
more_parts="train-clean-360 train-other-500"
dev_parts="dev-clean dev-other"
test_parts="test-clean test-other"
teacher=${teacher:-hubert-xlarge-ls960-ft}
noise=musan
