# shellcheck shell=bash disable=SC2154
# Steps that are done once: skipped when nothing they were made from has changed.
#
#     step NAME "AFTER" "OUTPUTS" COMMAND...
#
# runs COMMAND unless the stamp $stamps/NAME says that it has been run. A stamp is a hash of
# the command line, of the files named after --config (comments left out), of the names, sizes
# and times of the files in folders named after --dl_dir, of the files of a teacher that is not
# made here, and of the stamps named in AFTER. Options that do not change what is made (--device,
# --num_workers) are no part of it. When the hash has changed, OUTPUTS (paths, relative to the
# recipe) are put aside (.before) until the new ones are whole, and put back if COMMAND fails
# before it has made any of them, as for a mistyped conf, or if it was killed and the old hash is
# asked for again; when it has not, a step that was killed goes on with what it has left there. An
# output that ends in ? need not be there in the end. Of two runs that come to the same step, the
# second waits for the first. $launcher (words, empty by default) starts COMMAND, and is no part of
# the stamp either. Of several hosts (PET_NODE_RANK, torchrun's number of this one) the first does
# all of this; the others only take their part in the steps that train on all of them. With
# $dry_run true nothing is run: steps go to a list instead, see begin_plan.

log() {
    echo "$(date +%H:%M:%S) $*" >&2
}

# conf NAME...: "--config FILE" for each file of that name, from the general to the particular:
# the published settings, those of the scale, of the corpus, of its size, of the set of labels
# ($labels), and of the call ($overlay). A name that none of them has is passed on, for `step` to
# complain of.
conf() {
    local name file found
    for name; do
        found=false
        for file in "conf/$name.yaml" "conf/${scale:-none}/$name.yaml" \
            "egs/$corpus/conf/$name.yaml" "egs/$corpus/conf/${size:-none}/$name.yaml" \
            "conf/labels/${labels:-none}/$name.yaml" \
            "egs/$corpus/conf/labels/${labels:-none}/$name.yaml" \
            "${overlay:-none}/$name.yaml"; do
            [[ -f $file ]] || continue
            printf -- '--config %s ' "$file"
            found=true
        done
        $found || printf -- '--config %s ' "conf/$name.yaml"
    done
}

# recipe_file NAME: the most particular file of that name, of the scale, the corpus and its size.
recipe_file() {
    local file found=''
    for file in "conf/$1" "conf/${scale:-none}/$1" "egs/$corpus/conf/$1" \
        "egs/$corpus/conf/${size:-none}/$1"; do
        [[ ! -f $file ]] || found=$file
    done
    echo "$found"
}

# check_confs WHOSE NAME...: that each name has a file, before anything is run.
check_confs() {
    local whose=$1 file
    shift
    for file in $(conf "$@"); do
        if [[ $file != --config && ! -f $file ]]; then
            echo "$0: $whose$file: no such file; name confs that exist" >&2
            exit 1
        fi
    done
}

# check_stages LAST: that the options ask for one of stages 0 to LAST.
check_stages() {
    if ((stage > stop_stage || stage > $1 || stop_stage < 0)); then
        echo "$0: --stage $stage --stop-stage $stop_stage: no stage is of both; there are 0 to $1" >&2
        exit 1
    fi
}

# list WORD...: a YAML list.
list() {
    local IFS=,
    echo "[$*]"
}

_step_hash() {
    local after=$1 word previous='' stamp
    shift
    {
        for word; do
            case $previous in
                --device | --num_workers) ;;
                --config)
                    if [[ ! -f $word ]]; then
                        echo "$0: $word: no such file; name a conf that exists" >&2
                        return 1
                    fi
                    echo "$word"
                    sed -E -e 's/(^|[[:space:]]+)#.*//' -e '/^[[:space:]]*$/d' "$word"
                    ;;
                --dl_dir)
                    echo "$word"
                    [[ ! -d $word ]] || (cd "$word" && find . -type f -printf '%P %s %T@\n' | sort)
                    ;;
                --teacher | --init)
                    echo "$word"
                    # One that an earlier step made is known by that step's stamp.
                    [[ $word == "$exp"/* || ! -e $word ]] || _state_of "$word"
                    ;;
                *) echo "$word" ;;
            esac
            previous=$word
        done
        for stamp in $after; do
            cat "$stamps/$stamp" 2>/dev/null || echo "$stamp not done"
        done
    } | sha256sum | cut -d' ' -f1
    [[ ${PIPESTATUS[0]} -eq 0 ]]
}

# takes_gpu: whether the steps that take a device ($device) take a GPU.
takes_gpu() {
    [[ ${device:-cpu} == cuda ]] ||
        [[ ${device:-cpu} == auto && (-e /dev/nvidiactl || -e /dev/dxg || -e /dev/kfd) ]]
}

# attended COMMAND...: run it, and end it when this shell ends. In the background, because bash
# acts on a signal only when a command in the foreground has ended.
attended() {
    local child status=0
    "$@" &
    child=$!
    # shellcheck disable=SC2064  # this child
    trap "kill $child 2>/dev/null || true; wait $child || true" EXIT
    wait "$child" || status=$?
    trap - EXIT
    return "$status"
}

# Small files by their bytes; large ones, which would take seconds, by size and time.
_state_of() (
    if [[ -d $1 ]]; then
        cd "$1" || return
        set -- .
    fi
    find -H "$1" -maxdepth 1 -type f -size -64M -exec sha256sum {} + | sort
    find -H "$1" -maxdepth 1 -type f -size +63M -printf '%P %s %T@\n' | sort
)

_put_aside() {
    local path
    rm -rf "${@/%/.before}"
    for path; do
        [[ ! -e $path ]] || mv "$path" "$path.before"
    done
}

# _remove_begun OUTPUT...: what a run that was not finished has left.
_remove_begun() {
    # Of no settings from here on: nobody goes on with what is half removed.
    : >"$stamps/$name.begun"
    rm -rf "$@"
    rm "$stamps/$name.begun"
}

# _put_back OUTPUT...: what was put aside, with its stamp, unless there is something new.
_put_back() {
    local path
    for path; do
        [[ ! -e $path ]] || return 1
    done
    _restore "$@"
}

# _restore OUTPUT...: the same, in place of what is new.
_restore() {
    local path old
    old=$(cat "$stamps/$name.before" 2>/dev/null) || true
    if [[ -e $stamps/$name.begun && "$(cat "$stamps/$name.begun")" != "$old" ]]; then
        _remove_begun "$@"
    fi
    # The stamp last: with it they are taken as whole.
    for path in "$@" "$stamps/$name.begun" "$stamps/$name"; do
        [[ ! -e $path.before ]] || { rm -rf "$path" && mv -T "$path.before" "$path"; }
    done
}

# With $dry_run true steps go to a list, which show_plan prints with what they would cost.
begin_plan() {
    own_plan=false
    # One script calls another, and shows what both would do.
    [[ $dry_run == true && -z ${mvqkd_plan:-} ]] || return 0
    own_plan=true mvqkd_plan=$(mktemp)
    export mvqkd_plan
}

show_plan() {
    $own_plan || return 0
    local gpu=false
    ! takes_gpu || gpu=true
    # shellcheck disable=SC2046,SC2086
    python3 local/dry_run.py $(conf costs) --plan "$mvqkd_plan" --num_jobs "${at_once:-1}" \
        --gpu "$gpu" --teacher "${rates_of:-own}"
    rm "$mvqkd_plan"
}

# check_plan OPTION...: that the steps which this script would run with these options take their
# confs, so that a mistake in the last one's is told before the first has run.
check_plan() {
    local plan said status=0
    [[ ${PET_NODE_RANK:-0} == 0 ]] || return 0
    plan=$(mktemp)
    said=$(cd "$caller" && mvqkd_plan=$plan bash "$0" "$@" --dry-run true 2>&1) || status=$?
    if ((status > 0)); then
        echo "${said##*$'\n'}" >&2
    elif grep -q '^[^ ]* todo ' "$plan"; then
        python3 local/check_plan.py --plan "$plan" || status=$?
    fi
    rm -f "$plan"
    return "$status"
}

_plan() {
    local name=$1 after=$2 outputs=$3 hash output state='done' before
    shift 3
    hash=$(_step_hash "$after" "$@") || {
        rm -f "$mvqkd_plan"
        return 1
    }
    for output in $outputs; do
        [[ $output == *\? || -e $output ]] || state=todo
    done
    [[ "$(cat "$stamps/$name" 2>/dev/null)" == "$hash" ]] || state=todo
    for before in $after; do
        ! grep -q "^$before todo " "$mvqkd_plan" || state=todo
    done
    # shellcheck disable=SC2086
    echo "$name $state $(printf '%q ' ${launcher:-} "$@")" >>"$mvqkd_plan"
}

step() {
    local name=$1 after=$2 outputs=$3 hash output whole=true started
    shift 3
    if [[ ${dry_run:-false} == true ]]; then
        _plan "$name" "$after" "$outputs" "$@"
        return
    fi
    if [[ ${PET_NODE_RANK:-0} != 0 ]]; then
        [[ " $* " != *" mvqkd.launch "* ]] || attended "$@"
        return
    fi
    mkdir -p "$stamps"
    # Held by what the step starts too, should this shell be killed alone.
    exec {step_lock}>>"$stamps/.$name.lock"
    flock -n -E 75 "$step_lock" || case $? in
        75)
            log "$name: another run is at it; waiting"
            flock "$step_lock"
            ;;
        *) log "$name: no locks on the file system of $stamps: start no second run beside this" ;;
    esac
    hash=$(_step_hash "$after" "$@") || return 1
    # Put aside by a run with other settings, which was then killed: what it left is not wanted.
    if [[ "$(cat "$stamps/$name.before" 2>/dev/null)" == "$hash" ]]; then
        # shellcheck disable=SC2086
        _restore ${outputs//\?/}
    fi
    for output in $outputs; do
        [[ $output == *\? || -e $output ]] || whole=false
    done
    if $whole && [[ "$(cat "$stamps/$name" 2>/dev/null)" == "$hash" ]]; then
        log "$name: done already"
        exec {step_lock}>&-
        return 0
    fi
    if [[ "$(cat "$stamps/$name.begun" 2>/dev/null)" != "$hash" ]]; then
        if [[ ! -e $stamps/$name && -e $stamps/$name.before ]]; then
            # Left by a killed run; what is whole is aside already, and stays there.
            # shellcheck disable=SC2086
            _remove_begun ${outputs//\?/}
        else
            # shellcheck disable=SC2086
            _put_aside "$stamps/$name" "$stamps/$name.begun" ${outputs//\?/}
        fi
        echo "$hash" >"$stamps/$name.begun"
    fi
    rm -f "$stamps/$name"
    log "$name: begins"
    started=$SECONDS
    # shellcheck disable=SC2086  # words
    attended ${launcher:-} "$@" || {
        # shellcheck disable=SC2086
        _put_back ${outputs//\?/} || true
        log "$name: failed"
        return 1
    }
    for output in $outputs; do
        if [[ $output != *\? && ! -e $output ]]; then
            log "$name: did not leave $output"
            return 1
        fi
    done
    echo "$hash" >"$stamps/.$name.aside"
    mv "$stamps/.$name.aside" "$stamps/$name"
    # The stamp first: without it nobody puts back what is half removed.
    for output in "$stamps/$name" "$stamps/$name.begun" ${outputs//\?/}; do
        rm -rf "$output.before"
    done
    echo "$((SECONDS - started))" >"$stamps/$name.seconds"
    log "$name: done in $((SECONDS - started)) s"
    exec {step_lock}>&-
}
