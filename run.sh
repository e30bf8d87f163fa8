#!/usr/bin/env bash
# MVQ-KD: distil a self-supervised teacher into a small transducer through stored
# codebook indexes. Alone, on the embedded corpus; every stage that is done is skipped.
#
#   0  prepare.sh: corpus, manifests, features, word pieces
#   1  get the teacher
#   2  verify the teacher: WER of its CTC head
#   3  teacher embeddings of a sample of utterances
#   4  train the codebooks
#   5  dump the codebook indexes of the training set
#      (or, with --use-extracted-codebook true, take published ones, and nothing of 1 to 4)
#   6  train the students
#   7  decode the test sets
#   8  report
#   9  export for deployment

# shellcheck disable=SC2154  # the recipe of the corpus sets them
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

# options
stage=0              # first stage to run
stop_stage=9         # last stage to run
corpus=mini          # a folder of egs/
size=""              # of corpus mini: smoke, small (the default), full or large
split=""             # of corpus digits: take (the default) or speaker
dl_dir=""            # a copy of what would be downloaded
untranscribed_parts=""  # parts of the corpus that students with a teacher learn from as well, without
                     # their transcripts; these students are called STUDENT-and-untranscribed
noise_dir=""         # a folder of noise that is mixed into training, or none; the recipe's where empty
decoding=""          # a file of conf/decoding/, without .yaml, on top of decoding.yaml
decode_dev=false     # decode the dev sets too, of which scales are chosen
device=auto          # auto|cpu|cuda: where to run
teacher=""           # a file of conf/teacher/, without .yaml; the recipe's where empty
teacher_dir=""       # its folder or fairseq checkpoint, instead of what that file names
train_teacher=false  # train the embedded teacher anew instead of taking the shipped one
pretrain_teacher=false  # ... as HuBERT is made: predicting units of masked frames, before CTC
use_extracted_codebook=false  # take published codebook indexes, see conf/published.yaml
codebook_dir=""      # a copy of them, instead of the hub
label_launcher=""    # starts stage 5: for four GPUs
                     # "python3 -m mvqkd.launch --standalone --nproc-per-node 4 --no-python", or
                     # "local/slurm_array.sh 16 --gpus-per-task=1 --" for an array of 16 tasks
labels=""            # name of the set of labels that is dumped and learned from; mvq where empty,
                     # or published. conf/labels/NAME and egs/CORPUS/conf/labels/NAME hold its
                     # conf; students of another set than mvq are called STUDENT-NAME
students=""          # which of the recipe's students; all where empty
students_file=""     # lists them, instead of the recipe's students.txt
max_duration=""      # seconds of speech in a batch of each process that trains; the conf's where empty
overlay=""           # a folder of conf files that win over all others
num_workers=2        # processes of stage 0
num_gpus=1           # of this host, that train one model together; on the CPU, processes
num_jobs=2           # students that are trained at once on the CPU, threads shared among them
dry_run=false        # only print each command, and what it would cost
debug=false          # show where an error came from
# end of options

. local/parse_options.sh
if [[ $train_teacher == true && -n $teacher$teacher_dir ]]; then
    echo "$0: --train-teacher makes the embedded teacher; leave out --teacher and --teacher-dir" >&2
    exit 1
fi
if [[ $pretrain_teacher == true && $train_teacher == false ]]; then
    echo "$0: --pretrain-teacher begins what --train-teacher ends; give --train-teacher true too" >&2
    exit 1
fi
if [[ $use_extracted_codebook == true && $train_teacher$teacher$teacher_dir != false ]]; then
    echo "$0: --use-extracted-codebook runs no teacher; leave out --teacher, --teacher-dir and" \
        "--train-teacher" >&2
    exit 1
fi
if [[ $use_extracted_codebook == true && -n $untranscribed_parts ]]; then
    echo "$0: --untranscribed-parts $untranscribed_parts: published indexes are of the training parts" \
        "alone; leave one of them out" >&2
    exit 1
fi
if [[ $use_extracted_codebook == false && -n $codebook_dir ]]; then
    echo "$0: --codebook-dir $codebook_dir: is of --use-extracted-codebook true" >&2
    exit 1
fi
if [[ -z $labels ]]; then
    labels=mvq
    [[ $use_extracted_codebook == false ]] || labels=published
fi
# What rates of costs.yaml that are of the recipe's teacher say of this call's.
rates_of=own
[[ -z $teacher$teacher_dir ]] || rates_of=other
. local/recipe.sh
[[ $use_extracted_codebook == false ]] || teacher=""
. ./path.sh
. local/steps.sh
begin_plan

on() {
    ((stage <= $1 && stop_stage >= $1))
}

# The recipe's students: lines of a name and the conf files that make it differ.
listed=$students_file # by the call
if [[ -z $students_file ]]; then
    students_file=$(recipe_file students.txt)
elif [[ ! -f $students_file ]]; then
    echo "$0: --students-file $students_file: no such file; name one like conf/students.txt" >&2
    exit 1
fi
if [[ $labels != mvq && $use_extracted_codebook == false && ! -d conf/labels/$labels &&
    ! -d egs/$corpus/conf/labels/$labels ]]; then
    echo "$0: --labels $labels: neither conf/labels nor egs/$corpus/conf/labels has it; make a" \
        "folder of that name with what differs" >&2
    exit 1
fi
declare -A student_confs=()
student_names=()
# The last line may have no end; lines may end as on Windows.
while read -r student confs || [[ -n $student ]]; do
    [[ -n $student && $student != '#'* ]] || continue
    student_confs[$student]=$confs
    student_names+=("$student")
done < <(tr -d '\r' <"$students_file")
check_stages 9
if ((num_jobs < 1 || num_workers < 1 || num_gpus < 1)); then
    echo "$0: --num-jobs $num_jobs, --num-workers $num_workers, --num-gpus $num_gpus:" \
        "give at least 1 of each" >&2
    exit 1
fi
# Training on several hosts: torchrun's own variables say which, see README.md.
trainer=(python3)
if [[ ${PET_NNODES:-1} != 1 ]]; then
    trainer=(python3 -m mvqkd.launch --nproc-per-node "$num_gpus")
elif ((num_gpus > 1)); then
    trainer=(python3 -m mvqkd.launch --standalone --nproc-per-node "$num_gpus")
fi
known_students=${student_names[*]}
if [[ $use_extracted_codebook == true && -z $students ]]; then
    # The quantizer or embeddings that regression needs are not published, nor is the teacher.
    for student in "${student_names[@]}"; do
        [[ ${student_confs[$student]} == *@(distillation/*l[12]|in-loop)* ]] || students+="$student "
    done
    log "published indexes have no quantizer: students ${students% } of $known_students"
fi
[[ -z $students ]] || read -ra student_names <<<"$students"
if [[ -z $known_students ]]; then
    echo "$0: $students_file: names no student; write lines like those of conf/students.txt" >&2
    exit 1
fi
if [[ ${#student_names[@]} == 0 ]]; then
    echo "$0: --students '$students': names no student; $students_file has: $known_students" >&2
    exit 1
fi
twice=$(printf '%s\n' "${student_names[@]}" | sort | uniq -d | paste -sd ' ')
if [[ -n $twice ]]; then
    echo "$0: ${students:+--students $students of }$students_file: more than once: $twice; name each once" >&2
    exit 1
fi
for student in "${student_names[@]}"; do
    if [[ -z ${student_confs[$student]+set} ]]; then
        echo "$0: --students $student: not in $students_file; it has: $known_students" >&2
        exit 1
    fi
    # shellcheck disable=SC2086
    check_confs "$students_file: student $student: " ${student_confs[$student]}
done
[[ -z $decoding ]] || check_confs "--decoding $decoding: " "decoding/$decoding"
while IFS= read -r file; do
    # Of a name that nothing else has, and no student asks for.
    if [[ " ${student_confs[*]} decoding/$decoding " != *" ${file%.yaml} "* &&
        -z $(recipe_file "$file") ]]; then
        echo "$0: --overlay $overlay: no step reads $file; name it as a file of conf/" >&2
        exit 1
    fi
done < <([[ -z $overlay ]] || find "$overlay" -name '[!.]*.yaml' -printf '%P\n')

# One that is made here is the embedded one.
[[ $train_teacher == false ]] || teacher=""
[[ -n $teacher ]] || rates_of=made
teacher_conf=teacher/${teacher:-mini}
if [[ ! -f conf/$teacher_conf.yaml ]]; then
    known_teachers=$(cd conf/teacher && echo *.yaml)
    echo "$0: --teacher $teacher: not in conf/teacher; it has: ${known_teachers//.yaml/}" >&2
    exit 1
fi
# The layer of the embedded one is hardly that of another.
if [[ -n $teacher_dir && -z $asked_teacher && ${teacher:-mini} == mini ]]; then
    echo "$0: --teacher-dir $teacher_dir: say with --teacher which of conf/teacher it is" >&2
    exit 1
fi

# Students that learn from other labels or speech are others; those that the call lists have names of
# its own.
suffix=''
[[ $labels == mvq ]] || suffix=-$labels
[[ -z $untranscribed_parts ]] || suffix+=-and-untranscribed
if [[ -n $suffix && -z $listed ]]; then
    for i in "${!student_names[@]}"; do
        student=${student_names[i]}
        [[ ${student_confs[$student]} != *distillation/none* ]] || continue
        student_names[i]=$student$suffix
        student_confs[$student$suffix]=${student_confs[$student]}
    done
fi

# quoted WORD: as both a shell and Python's shlex read it.
quoted() {
    if [[ $1 =~ [^[:alnum:]_./:@%+=,-] ]]; then
        echo "'${1//\'/\'\"\'\"\'}'"
    else
        echo "$1"
    fi
}

# What made the results: the options that change them.
invocation() {
    local gpus_option='' published='' files='' pretraining=''
    [[ $pretrain_teacher == false ]] || pretraining=" --pretrain-teacher true"
    ((num_gpus == 1)) || gpus_option=" --num-gpus $num_gpus"
    [[ $use_extracted_codebook == false ]] ||
        published="--use-extracted-codebook true ${codebook_dir:+--codebook-dir $(quoted "${typed[codebook_dir]}") }"
    files=${typed[dl_dir]:+--dl-dir $(quoted "${typed[dl_dir]}") }
    files+=${typed[noise_dir]:+--noise-dir $(quoted "${typed[noise_dir]}") }
    files+=${untranscribed_parts:+--untranscribed-parts \"$untranscribed_parts\" }
    files+=${listed:+--students-file $(quoted "$listed") }${overlay:+--overlay $(quoted "$overlay") }
    files+=${decoding:+--decoding $decoding }
    files+=${max_duration:+--max-duration $max_duration }
    [[ $decode_dev == false ]] || files+="--decode-dev true "
    echo "./run.sh --corpus $corpus${size:+ --size $size}${split:+ --split $split}" \
        "${teacher:+--teacher $teacher }${teacher_dir:+--teacher-dir $(quoted "${typed[teacher_dir]}") }--labels $labels" \
        "${published}${files}${students:+--students \"$students\" }--train-teacher" \
        "$train_teacher${pretraining}${gpus_option}"
}

[[ $dry_run == true ]] || check_plan "$@"

manifests() {
    local part paths=()
    for part; do
        paths+=("$data/$manifest_kind/$part.jsonl.gz")
    done
    list "${paths[@]}"
}

# unread_labels PART: where the labels of a part without transcripts are.
unread_labels() {
    echo "$data/untranscribed/labels/$labels/$1"
}

if on 0; then
    attended ./prepare.sh --corpus "$corpus" --size "$size" --split "$split" \
        --dl-dir "$dl_dir" --untranscribed-parts "$untranscribed_parts" \
        --noise-dir "$noise_dir" --overlay "$overlay" \
        --num-workers "$num_workers" --dry-run "$dry_run" --debug "$debug"
fi

# train_ctc NAME AFTER OPTION...
train_ctc() {
    local made=$1 after=$2
    shift 2
    # shellcheck disable=SC2086
    step "$made" "$after" "$exp/$made $exp/$made-training" \
        "${trainer[@]}" local/train_teacher.py "$@" \
        --train_manifests "$(manifests $train_parts $pool_parts)" \
        --dev_manifests "$(manifests $dev_parts)" \
        --work_dir "$exp/$made-training" --out_dir "$exp/$made" --device "$device"
}

# predict_units NAME AFTER UNITS OPTION...
predict_units() {
    local made=$1 after=$2 units=$3
    shift 3
    # shellcheck disable=SC2086
    step "$made" "$after" "$exp/$made $exp/$made-training" \
        "${trainer[@]}" local/pretrain_teacher.py "$@" --units "$units" \
        --train_manifests "$(manifests $train_parts $pool_parts)" \
        --dev_manifests "$(manifests $dev_parts)" \
        --work_dir "$exp/$made-training" --out_dir "$exp/$made" --device "$device"
}

if [[ $use_extracted_codebook == true ]] && ((stage <= 4 && stop_stage >= 1)); then
    log "stages 1 to 4: published indexes need none of them"
fi

# makes_labels STAGE: whether it is to run, as it does where labels are made here.
makes_labels() {
    [[ $use_extracted_codebook == false ]] && on "$1"
}

manifest_kind=manifests
if makes_labels 1; then
    if [[ -z $teacher ]]; then
        # CTC at several speeds ends it, whatever it begins with: masked prediction, the recipe's own
        # teacher, or CTC from random weights.
        if [[ $pretrain_teacher == true ]]; then
            # shellcheck disable=SC2046
            predict_units teacher-pretrained-first manifests mfcc \
                $(conf teacher-model teacher-pretraining)
            # shellcheck disable=SC2046
            predict_units teacher-pretrained "teacher-pretrained-first" \
                "$exp/teacher-pretrained-first" \
                $(conf teacher-model teacher-pretraining teacher-pretraining-second)
            teacher_init=$exp/teacher-pretrained
            tuned_after="teacher-pretrained"
        elif [[ -z $teacher_init ]]; then
            teacher_init=$exp/teacher-first
            # shellcheck disable=SC2046
            train_ctc teacher-first manifests $(conf teacher-model teacher-training)
            tuned_after="teacher-first"
        fi
        # shellcheck disable=SC2046
        train_ctc teacher "${tuned_after:-manifests}" \
            $(conf teacher-model teacher-training teacher-tuning) --init "$teacher_init"
    else
        # Named to the step, which then knows when a folder or file has changed.
        # shellcheck disable=SC2046
        named=${teacher_dir:-$(python3 local/conf_value.py teacher $(conf "$teacher_conf"))}
        # shellcheck disable=SC2046
        step teacher "" "$exp/teacher" python3 local/get_teacher.py $(conf "$teacher_conf") \
            ${named:+--teacher "$named"} --out_dir "$exp/teacher"
    fi
fi
if makes_labels 2; then
    # shellcheck disable=SC2046,SC2086
    step verify-teacher "teacher manifests" "$exp/teacher-wer" \
        python3 local/verify_teacher.py --teacher "$exp/teacher" \
        --test_manifests "$(manifests $test_parts)" --out_dir "$exp/teacher-wer" --device "$device"
fi

manifest_kind=fbank
quantizer=$exp/quantizer/$labels/quantizer.pt
if makes_labels 3; then
    # shellcheck disable=SC2046
    step "embeddings-$labels" "teacher features" "$exp/quantizer/$labels/embeddings.h5" \
        python3 local/sample_embeddings.py $(conf "$teacher_conf" sample) --teacher "$exp/teacher" \
        --train_manifest "$data/fbank/train.jsonl.gz" \
        --out "$exp/quantizer/$labels/embeddings.h5" --device "$device"
fi
if makes_labels 4; then
    # shellcheck disable=SC2046
    step "quantizer-$labels" "embeddings-$labels" \
        "$quantizer $exp/quantizer/$labels/diagnostics.json $exp/quantizer/$labels/checkpoint.pt?" \
        python3 local/train_quantizer.py $(conf quantizer) \
        --embeddings "$exp/quantizer/$labels/embeddings.h5" --out_dir "$exp/quantizer/$labels" \
        --device "$device"
fi
if makes_labels 5; then
    # shellcheck disable=SC2046
    launcher=$label_launcher step "labels-$labels" "quantizer-$labels features" \
        "$data/labels/$labels $data/labels/$labels/train.jsonl.gz" \
        python3 local/dump_labels.py $(conf labels) --teacher "$exp/teacher" \
        --quantizer "$quantizer" --train_manifest "$data/fbank/train.jsonl.gz" \
        --out "$data/labels/$labels/train.jsonl.gz" --device "$device"
    for part in $untranscribed_parts; do
        # shellcheck disable=SC2046
        launcher=$label_launcher step "more-labels-$labels-$part" \
            "quantizer-$labels more-features-$part" \
            "$(unread_labels "$part") $(unread_labels "$part")/cuts.jsonl.gz" \
            python3 local/dump_labels.py $(conf labels) --teacher "$exp/teacher" \
            --quantizer "$quantizer" --out "$(unread_labels "$part")/cuts.jsonl.gz" \
            --train_manifest "$data/untranscribed/fbank/$part.jsonl.gz" --device "$device"
    done
fi
if [[ $use_extracted_codebook == true ]] && on 5; then
    # shellcheck disable=SC2046,SC2086
    step "labels-$labels" features \
        "$data/labels/$labels $data/labels/$labels/train.jsonl.gz" \
        python3 local/take_labels.py $(conf published) --parts "$(list $train_parts)" \
        --train_manifest "$data/fbank/train.jsonl.gz" ${codebook_dir:+--dl_dir "$codebook_dir"} \
        --out "$data/labels/$labels/train.jsonl.gz"
fi

train_student() {
    local student=$1 confs part unread=() kind_args=() after="features tokens"
    local manifest=$data/fbank/train.jsonl.gz
    confs="student training ${student_confs[$student]}"
    if [[ $confs != *distillation/none* ]]; then
        after="labels-$labels tokens"
        manifest=$data/labels/$labels/train.jsonl.gz
        [[ $use_extracted_codebook == true ]] || kind_args=(--distillation.quantizer "$quantizer")
        for part in $untranscribed_parts; do
            after+=" more-labels-$labels-$part"
            unread+=("$(unread_labels "$part")/cuts.jsonl.gz")
        done
        [[ ${#unread[@]} == 0 ]] || kind_args+=(--untranscribed_manifests "$(list "${unread[@]}")")
    fi
    [[ -z $max_duration ]] || kind_args+=(--data.max_duration "$max_duration")
    if [[ -n $noise ]]; then
        after+=" noise"
        kind_args+=(--data.noise.manifest "$data/noise/noise.jsonl.gz")
    fi
    # shellcheck disable=SC2046,SC2086
    step "student-$student" "$after" "$exp/$student" \
        "${trainer[@]}" local/train_student.py $(conf $confs) "${kind_args[@]}" \
        --train_manifest "$manifest" --dev_manifests "$(manifests $dev_parts)" \
        --tokens_dir "$data/tokens" --exp_dir "$exp/$student" --device "$device"
}

# On the CPU small students train faster side by side, one thread each, than one after the
# other with all threads.
train_students() {
    local student cores running=0
    at_once=$num_jobs
    if [[ ${#trainer[@]} -gt 1 ]] || takes_gpu; then
        at_once=1
    elif [[ -z ${OMP_NUM_THREADS:-} ]]; then
        cores=$(nproc)
        local -x OMP_NUM_THREADS=$((cores > at_once ? cores / at_once : 1))
    fi
    if [[ $dry_run == true ]]; then
        for student in "${student_names[@]}"; do
            train_student "$student"
        done
        return
    fi
    # One that fails ends the others, which leave their checkpoints.
    trap 'kill $(jobs -p) 2>/dev/null || true; wait || true' EXIT
    for student in "${student_names[@]}"; do
        if ((running >= at_once)); then
            wait -n
            running=$((running - 1))
        fi
        train_student "$student" &
        running=$((running + 1))
    done
    for ((; running > 0; running--)); do
        wait -n
    done
    trap - EXIT
}

if on 6; then
    train_students
fi
decoded_parts=$test_parts
[[ $decode_dev == false ]] || decoded_parts+=" $dev_parts"
if on 7; then
    for student in "${student_names[@]}"; do
        # shellcheck disable=SC2046,SC2086
        step "decode-$student" "student-$student" "$exp/$student/decoded.json" \
            python3 local/decode.py $(conf decoding ${decoding:+decoding/$decoding}) \
            --exp_dir "$exp/$student" --test_manifests "$(manifests $decoded_parts)" \
            --tokens_dir "$data/tokens" --device "$device"
    done
fi
if on 8; then
    made_by=verify-teacher report_args=()
    [[ $use_extracted_codebook == false ]] || made_by=labels-$labels report_args=(--published true)
    # shellcheck disable=SC2046,SC2086
    step report "$made_by ${student_names[*]/#/decode-}" \
        "$exp/results.json $exp/report" \
        python3 local/report.py $(conf report) "${report_args[@]}" --exp_dir "$exp" \
        --data_dir "$data" --labels "$labels" --test_manifests "$(manifests $decoded_parts)" \
        --students "$(list "${student_names[@]}")" --command "$(invocation)"
    [[ $dry_run == true ]] || cat "$exp/report/table.txt"
fi
if on 9; then
    log "stage 9: export for deployment is not there yet"
fi
show_plan
