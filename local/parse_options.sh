# shellcheck shell=bash
# Command-line options in Kaldi's manner, for bash scripts. A script lists its
# variables at its head and then sources this file:
#
#     # options
#     stage=0        # first stage to run
#     device=auto    # auto|cpu|cuda: where to run
#     # end of options
#     . local/parse_options.sh
#
# Each of them can then be set with --name value or --name=value, and dashes stand
# for underscores. A variable whose default is true or false takes only these, one
# whose default is an integer only integers, and one whose comment begins with
# a|b|c: only these words. --help prints the comment at the script's top, and the
# options with their defaults.

parse_options() {
    # Names begin with _po_ so that they hide none of the script's variables.
    local _po_script=$1 _po_line _po_inside=false _po_top=true _po_usage='' _po_about=''
    local _po_name _po_value _po_default _po_choices _po_known=''
    local -A _po_defaults=() _po_words=()
    shift
    # The path was given from where the script started; it may have gone to its own folder since.
    [[ -r $_po_script ]] || _po_script=${_po_script##*/}
    while IFS= read -r _po_line; do
        if [[ $_po_top == true && $_po_line == '#'* ]]; then
            [[ $_po_line == '#!'* || $_po_line == '# shellcheck'* || $_po_line == '# options' ]] ||
                _po_about+="${_po_line#\#}"$'\n'
        else
            _po_top=false
        fi
        case $_po_line in
            '# options') _po_inside=true _po_top=false ;;
            '# end of options') break ;;
        esac
        if [[ $_po_inside == true && $_po_line =~ ^[[:space:]]+'# '(.*) ]]; then
            _po_usage=${_po_usage% (default: *}" ${BASH_REMATCH[1]} (default:${_po_usage##* (default:}"
        fi
        [[ $_po_inside == true && $_po_line =~ ^([A-Za-z_][A-Za-z0-9_]*)= ]] || continue
        _po_name=${BASH_REMATCH[1]}
        _po_value=''
        [[ $_po_line != *[[:space:]]'# '* ]] || _po_value=${_po_line#*[[:space:]]'# '}
        _po_defaults[$_po_name]=${!_po_name}
        [[ $_po_value =~ ^([^ |]+(\|[^ |]+)+): ]] && _po_words[$_po_name]=${BASH_REMATCH[1]}
        _po_known+=" --${_po_name//_/-}"
        printf -v _po_line '  --%-24s %s (default: %s)\n' \
            "${_po_name//_/-}" "$_po_value" "${!_po_name:-empty}"
        _po_usage+=$_po_line
    done <"$_po_script"

    while (($#)); do
        case $1 in
            -h | --help)
                printf 'Usage: %s [--option value]...\n%s\nOptions:\n%s' \
                    "$0" "${_po_about:+$'\n'$_po_about}" "$_po_usage"
                exit 0
                ;;
            --?*=*) _po_name=${1%%=*} _po_value=${1#*=} ;;
            --?*)
                _po_name=$1
                # A word that begins with -- is the next option; --name=--word passes it on.
                if (($# < 2)) || [[ $2 == --* ]]; then
                    _po_fail "option $1 needs a value; write $1 VALUE"
                fi
                _po_value=$2
                ;;
            *) _po_fail "unexpected argument '$1'; options are --name value, see --help" ;;
        esac
        [[ $1 == --?*=* ]] || shift
        shift
        _po_line=$_po_name
        _po_name=${_po_name#--}
        _po_name=${_po_name//-/_}
        [[ $_po_name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && -v _po_defaults[$_po_name] ]] ||
            _po_fail "unknown option $_po_line; the options are$_po_known"
        _po_default=${_po_defaults[$_po_name]}
        _po_choices=${_po_words[$_po_name]:-}
        if [[ $_po_default == true || $_po_default == false ]]; then
            _po_choices='true|false'
        elif [[ $_po_default =~ ^-?[0-9]+$ && ! $_po_value =~ ^-?[0-9]+$ ]]; then
            _po_fail "option $_po_line: '$_po_value' is not an integer; the default is $_po_default"
        elif [[ $_po_default =~ ^-?[0-9]+$ && $_po_value =~ ^-?0[0-9] ]]; then
            # Bash would take it as octal.
            _po_fail "option $_po_line: '$_po_value' begins with 0; write it without"
        fi
        [[ -z $_po_choices || "|$_po_choices|" == *"|$_po_value|"* && $_po_value != *'|'* ]] ||
            _po_fail "option $_po_line: '$_po_value' is none of ${_po_choices//|/, }; give one of them"
        printf -v "$_po_name" %s "$_po_value"
    done
}

_po_fail() {
    printf '%s: %s\n' "$0" "$1" >&2
    exit 1
}

parse_options "${BASH_SOURCE[1]}" "$@"
unset -f parse_options _po_fail
