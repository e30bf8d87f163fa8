# shellcheck shell=bash disable=SC2034,SC2154,SC1090
# What run.sh and prepare.sh share once their options are read: the corpus's recipe, and
# where things are.

if [[ ! -f egs/$corpus/recipe.sh ]]; then
    echo "$0: --corpus $corpus: not known; give one of: $(cd egs && echo *)" >&2
    exit 1
fi
# Names of parts, ${more_parts} of such as are fetched only where they are asked for; ${name}: the
# folder under data/ and exp/; ${teacher}: of conf/teacher, or ${teacher_init}: the folder of one
# that is trained on; ${noise}: musan where that is mixed in; ${options}: which of those it has that
# not every corpus has.
options="" teacher_init="" noise="" more_parts=""
given=(size "$size" split "$split" dl_dir "$dl_dir")
asked_teacher=${teacher:-}
. "egs/$corpus/recipe.sh"
# The call's wins over the recipe's.
teacher=${asked_teacher:-${teacher:-}}
for ((i = 0; i < ${#given[@]}; i += 2)); do
    if [[ -n ${given[i + 1]} && " $options " != *" ${given[i]} "* ]]; then
        echo "$0: --${given[i]//_/-} ${given[i + 1]}: is nothing to corpus $corpus; leave it out" >&2
        exit 1
    fi
done
for part in ${untranscribed_parts:-}; do
    # shellcheck disable=SC2153
    if [[ " $pool_parts $more_parts " != *" $part "* ]]; then
        echo "$0: --untranscribed-parts $part: is none of corpus $corpus; it has:" \
            "$pool_parts $more_parts" >&2
        exit 1
    fi
done
if [[ ${noise_dir:-} == none ]]; then
    noise=""
elif [[ -n ${noise_dir:-} ]]; then
    noise=$noise_dir
fi
data=data/$name
exp=exp/$name
stamps=$exp/stamps
# A relative path is meant from where the user called. One folder has one name, which stamps hold;
# a file keeps its own, whose ending says what it is.
declare -A typed=()
for option in dl_dir noise_dir teacher_dir codebook_dir; do
    path=${!option:-}
    typed[$option]=$path
    [[ -n $path && $path != none ]] || continue
    [[ $path == /* ]] || path=$caller/$path
    [[ -f $path ]] || path=$(realpath -m -- "$path")
    printf -v "$option" %s "$path"
done
if [[ $caller != "$PWD" ]]; then
    [[ -z ${students_file:-} || $students_file == /* ]] || students_file=$caller/$students_file
    [[ -z $overlay || $overlay == /* ]] || overlay=$caller/$overlay
fi
if [[ $overlay == *[[:space:]*?[\\]* ]]; then
    echo "$0: --overlay $overlay: its path has a space, *, ?, [ or \\; name a folder without" >&2
    exit 1
fi
if [[ -n $overlay && ! -d $overlay ]]; then
    echo "$0: --overlay $overlay: no such folder; name one with conf files" >&2
    exit 1
fi
[[ $debug == false ]] || export MVQKD_DEBUG=1
