#!/usr/bin/env bash
# Data of one corpus: audio, manifests, features, word pieces. run.sh calls it as stage 0.
#
#   0  make or download the corpus, in LibriSpeech's folder layout
#   1  lhotse manifests; broken utterances are counted, listed and left out
#   2  features; the training parts also at other speeds; those of noise
#   3  word pieces from the training transcripts

# shellcheck disable=SC2154  # the recipe of the corpus sets them
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

# options
stage=0          # first stage to run
stop_stage=3     # last stage to run
corpus=mini      # a folder of egs/
size=""          # of corpus mini: smoke, small (the default), full or large
split=""         # of corpus digits: take (the default) or speaker
dl_dir=""        # a copy of what would be downloaded
untranscribed_parts=""  # speech that is learned from without its transcripts, see README.md
noise_dir=""     # a folder of noise that is mixed into training, or none; the recipe's where empty
num_workers=2    # processes
overlay=""       # a folder of conf files that win over all others
dry_run=false    # only print each command, and what it would cost
debug=false      # show where an error came from
# end of options

. local/parse_options.sh
. local/recipe.sh
. ./path.sh
. local/steps.sh
begin_plan
check_stages 3

if ((stage <= 0 && stop_stage >= 0)); then
    # shellcheck disable=SC2046
    step corpus "" "$data/corpus" \
        python3 "${make_corpus:-egs/$corpus/make_corpus.py}" $(conf corpus) ${split:+--split "$split"} \
        ${dl_dir:+--dl_dir "$dl_dir"} --out_dir "$data/corpus" --num_workers "$num_workers"
fi
if ((stage <= 1 && stop_stage >= 1)); then
    # shellcheck disable=SC2046,SC2086
    step manifests "corpus" "$data/manifests" \
        python3 local/prepare_manifests.py $(conf check) --corpus_dir "$data/corpus" \
        --parts "$(list $train_parts $pool_parts $dev_parts $test_parts)" \
        --out_dir "$data/manifests"
fi
if ((stage <= 2 && stop_stage >= 2)); then
    # shellcheck disable=SC2046,SC2086
    step features "manifests" "$data/fbank $data/fbank/train.jsonl.gz" \
        python3 local/compute_features.py $(conf features) --manifests_dir "$data/manifests" \
        --train_parts "$(list $train_parts)" --test_parts "$(list $dev_parts $test_parts)" \
        --out_dir "$data/fbank" --num_workers "$num_workers"
fi
for part in $untranscribed_parts; do
    made=$data/manifests after="manifests"
    if [[ " $more_parts " == *" $part "* ]]; then
        made=$data/untranscribed/manifests after="more-manifests-$part"
        if ((stage <= 0 && stop_stage >= 0)); then
            # shellcheck disable=SC2046
            step "more-corpus-$part" "" "$data/untranscribed/corpus/$part" \
                python3 "${make_corpus:-egs/$corpus/make_corpus.py}" $(conf corpus) --parts "[$part]" \
                ${dl_dir:+--dl_dir "$dl_dir"} --out_dir "$data/untranscribed/corpus/$part" \
                --num_workers "$num_workers"
        fi
        if ((stage <= 1 && stop_stage >= 1)); then
            # shellcheck disable=SC2046
            step "more-manifests-$part" "more-corpus-$part" "$made/$part.jsonl.gz" \
                python3 local/prepare_manifests.py $(conf check) --parts "[$part]" \
                --corpus_dir "$data/untranscribed/corpus/$part" --out_dir "$made"
        fi
    fi
    if ((stage <= 2 && stop_stage >= 2)); then
        # At their own speed alone: there is more of it than of the transcribed speech.
        # shellcheck disable=SC2046
        step "more-features-$part" "$after" \
            "$data/untranscribed/fbank/$part $data/untranscribed/fbank/$part.jsonl.gz" \
            python3 local/compute_features.py $(conf features) --manifests_dir "$made" \
            --train_parts "[]" --test_parts "[$part]" --out_dir "$data/untranscribed/fbank" \
            --num_workers "$num_workers"
    fi
done
if [[ -n $noise ]] && ((stage <= 2 && stop_stage >= 2)); then
    # shellcheck disable=SC2046
    step noise "" "$data/noise $data/noise/noise.jsonl.gz" \
        python3 local/prepare_noise.py $(conf features) ${noise_dir:+--dl_dir "$noise_dir"} \
        --out_dir "$data/noise" --num_workers "$num_workers"
fi
if ((stage <= 3 && stop_stage >= 3)); then
    # shellcheck disable=SC2046
    step tokens "features" "$data/tokens" \
        python3 local/train_tokens.py $(conf tokens) --train_manifest "$data/fbank/train.jsonl.gz" \
        --out_dir "$data/tokens"
fi
show_plan
