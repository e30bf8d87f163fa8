# shellcheck shell=bash disable=SC2154
# Steps that are done once: skipped when nothing they were made from has changed.
#
#     step NAME "AFTER" "OUTPUTS" COMMAND...
#
# runs COMMAND unless the stamp $stamps/NAME says that it has been run. A stamp is a hash of
# the command line, of the files named after --config (comments left out), of the lists of
# files in folders named after --dl_dir, and of the stamps named in AFTER. Options that do
# not change what is made (--device, --num_workers) are no part of it. When the hash has
# changed, OUTPUTS (paths, relative to the recipe) are removed first; when it has not, a
# step that was killed goes on with what it has left there.

log() {
    echo "$(date +%H:%M:%S) $*" >&2
}

# conf NAME...: "--config FILE" for each file of that name, from the general to the particular:
# the published settings, those of the scale, of the corpus, and of its size.
conf() {
    local name file
    for name; do
        for file in "conf/$name.yaml" "conf/${scale:-none}/$name.yaml" \
            "egs/$corpus/conf/$name.yaml" "egs/$corpus/conf/${size:-none}/$name.yaml"; do
            [[ ! -f $file ]] || printf -- '--config %s ' "$file"
        done
    done
}

# list WORD...: a YAML list.
list() {
    local IFS=,
    echo "[$*]"
}

_step_hash() {
    local after=$1 word previous='' name
    shift
    {
        for word; do
            case $previous in
                --device | --num_workers) ;;
                --config)
                    if [[ ! -f $word ]]; then
                        echo "$word: no such file; name a conf that exists" >&2
                        return 1
                    fi
                    echo "$word"
                    sed -e 's/[[:space:]]*#.*//' -e '/^[[:space:]]*$/d' "$word"
                    ;;
                --dl_dir) [[ ! -d $word ]] || (cd "$word" && find . -type f -printf '%P %s\n' | sort) ;;
                *) echo "$word" ;;
            esac
            previous=$word
        done
        for name in $after; do
            cat "$stamps/$name" 2>/dev/null || echo "$name not done"
        done
    } | sha256sum | cut -d' ' -f1
    [[ ${PIPESTATUS[0]} -eq 0 ]]
}

step() {
    local name=$1 after=$2 outputs=$3 hash output whole=true started
    shift 3
    mkdir -p "$stamps"
    hash=$(_step_hash "$after" "$@") || return 1
    for output in $outputs; do
        [[ -e $output ]] || whole=false
    done
    if $whole && [[ "$(cat "$stamps/$name" 2>/dev/null)" == "$hash" ]]; then
        log "$name: done already"
        return 0
    fi
    if [[ "$(cat "$stamps/$name.begun" 2>/dev/null)" != "$hash" ]]; then
        for output in $outputs; do
            rm -rf "${output:?}"
        done
        echo "$hash" >"$stamps/$name.begun"
    fi
    rm -f "$stamps/$name"
    log "$name: begins"
    started=$SECONDS
    "$@" || {
        log "$name: failed"
        return 1
    }
    for output in $outputs; do
        if [[ ! -e $output ]]; then
            log "$name: did not leave $output"
            return 1
        fi
    done
    echo "$hash" >"$stamps/.$name.aside"
    mv "$stamps/.$name.aside" "$stamps/$name"
    echo "$((SECONDS - started))" >"$stamps/$name.seconds"
    log "$name: done in $((SECONDS - started)) s"
}
