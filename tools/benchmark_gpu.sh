#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one call of less than 9 minutes, without network and without
# installing the project: the tests that need a GPU, the benchmarks, and the table of what must come out.
#
#   tools/benchmark_gpu.sh [--small] [RESULTS [WHEELS]]
#
#   RESULTS  folder for figures.jsonl, table.md, profile.txt and log.txt (default: $OUT, else runs/benchmark_gpu)
#   WHEELS   folder of wheels; of those, what this Python lacks is put at the end of its path. Never torch
#            Made where there is a network, by the same version of Python:
#            python3 -m pip wheel --wheel-dir WHEELS fvcore safetensors tensorboard simplejpeg pytest
#   --small  the same parts on the CPU, as small as they can be: to try the script
#   --help   this
#
# From the environment:
#   PYTHON   interpreter with torch, torchvision and numpy (default: python3)
#   PARTS    which parts, as in "detco step" (default: all, see ALL_PARTS)
#   TOTAL_S  seconds for everything (default: 520); with more, each part may take longer in proportion. Parts for which
#            no time is left are named in the table
#
# A part that fails or takes too long costs its own figures only. Photos are drawn on the spot, nothing has to travel.
# Exit codes: 0 also if something failed or is not reached, which the table says; 2 refused before any work.
set -u
ALL_PARTS="tests detco moco_v2 soco_fpn step eager group start views"
USUAL_S=520 # what the limits of the parts are made for

refuse() {
    echo "error: $*; see tools/benchmark_gpu.sh --help" >&2
    exit 2
}

small=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
            exit
            ;;
        --small) small=1 ;;
        -*) refuse "there is no option $1" ;;
        *) break ;;
    esac
    shift
done
[ $# -gt 2 ] && refuse "there are more words than RESULTS and WHEELS: $*"
root=$(cd "$(dirname "$0")/.." && pwd)
results=${1:-${OUT:-$root/runs/benchmark_gpu}}
wheels=${2:-}
python=${PYTHON:-python3}
parts=${PARTS:-$ALL_PARTS}
total_s=${TOTAL_S:-$USUAL_S}
table_s=8 # kept for the table
least_s=4 # a part that gets less is not started

for name in $parts; do
    [[ " $ALL_PARTS none " == *" $name "* ]] || refuse "PARTS has $name, which is none of: $ALL_PARTS"
done
[[ $total_s =~ ^[1-9][0-9]*$ ]] || refuse "TOTAL_S is $total_s, which is no number of seconds"
command -v "$python" >/dev/null || refuse "there is no program $python: set PYTHON"
[ -z "$wheels" ] || [ -d "$wheels" ] || refuse "there is no folder $wheels of wheels"
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)
# Relative to where the script was called, and not to the project:
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)
case $python in [!/]*/*) python=$PWD/$python ;; esac
log=$results/log.txt
figures=$results/figures.jsonl
: >"$log"
: >"$figures"
rm -f "$results/profile.txt"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
troubles=()
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}:$scratch/site"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}" # what one part compiles, the next finds
export PYTHONUNBUFFERED=1
cd "$root" || exit 2

say() {
    echo "$(printf '%4d s' "$SECONDS")  $*" | tee -a "$log"
}

# trouble PART TEXT: remembered for the table
trouble() {
    say "$1: $2"
    troubles+=(--trouble "$1" "$2")
}

# install_missing FOLDER: puts the packages of wheels, as far as this Python lacks them, where PYTHONPATH ends
install_missing() {
    local wheel name
    for wheel in "$1"/*.whl; do
        name=$(basename "$wheel")
        name=${name%%-*}
        case $name in torch | torchvision | triton | nvidia*) continue ;; esac
        "$python" -c 'import importlib.metadata as m, sys; m.version(sys.argv[1])' "$name" 2>>/dev/null && continue
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" \
            "$wheel" >>"$log" 2>&1 || say "wheels: $name could not be installed, see log.txt"
    done
}

# part NAME SECONDS COMMAND...: figures are kept, everything else goes into the log
part() {
    local name=$1 limit=$2 left code began=$SECONDS
    shift 2
    case " $parts " in
        *" $name "*) ;;
        *)
            troubles+=(--trouble "$name" "was left out")
            return
            ;;
    esac
    left=$((total_s - table_s - SECONDS))
    if [ "$left" -lt "$least_s" ]; then
        trouble "$name" "no time was left"
        return
    fi
    [ "$total_s" -gt "$USUAL_S" ] && limit=$((limit * total_s / USUAL_S))
    [ "$limit" -gt "$left" ] && limit=$left
    say "$name, at most $limit s: $*"
    timeout --kill-after=10 "$limit" "$@" >>"$figures" 2>>"$log"
    code=$?
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        trouble "$name" "was ended after $limit s"
    elif [ "$code" -ne 0 ]; then
        trouble "$name" "failed with exit code $code, see log.txt"
    else
        say "$name: done in $((SECONDS - began)) s"
    fi
}

# Words for each program; what comes later wins.
run=("$python" tools/benchmark_run.py)
step=("$python" tools/benchmark_step.py --rounds 3 --min-seconds 0.2)
views=("$python" tools/benchmark_views.py --methods moco_v2 detco soco_fpn --rounds 3 --min-seconds 0.3)
tests=(tests/detco tests/pretrain tests/dist -m gpu --continue-on-collection-errors)
sizes=()
if [ -n "$small" ]; then
    sizes=(--cpu --batch-size 2 --workers 1 --rounds 1 --seconds 0.1 --paths 100000 --samples 2000)
    step+=(--cpu --batch-size 2 --memory-batch-size 2 --queue-size 64 --global-size 64 --patch-size 32)
    step+=(--rounds 1 --min-seconds 0)
    views+=(--device cpu --num-photos 2 --large-photos 1 --batch-size 2 --rounds 1 --min-seconds 0)
    tests=(tests/detco/test_models_ema.py)
fi
pytest_main='import os, sys; os.dup2(2, 1); import pytest; sys.exit(pytest.main(sys.argv[1:]))' # all it says goes to 2
whole=(--parts train reference --rounds 2 --seconds 5 --profile "$results/profile.txt")
once=(--methods detco moco_v2 --parts train --rounds 1 --seconds 4)

say "$("$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)' 2>&1)"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >>"$log"
[ -n "$wheels" ] && install_missing "$wheels"

part tests 60 "$python" -c "$pytest_main" "${tests[@]}" -p no:cacheprovider
part detco 150 "${run[@]}" --methods detco "${whole[@]}" ${sizes[@]+"${sizes[@]}"}
part moco_v2 90 "${run[@]}" --methods moco_v2 "${whole[@]}" ${sizes[@]+"${sizes[@]}"}
part soco_fpn 120 "${run[@]}" METHOD.LEVEL_ROUTING own --methods soco_fpn "${whole[@]}" ${sizes[@]+"${sizes[@]}"}
part step 100 "${step[@]}"
part eager 60 "${run[@]}" SOLVER.COMPILE off "${once[@]}" ${sizes[@]+"${sizes[@]}"}
part group 90 "${run[@]}" METHOD.BN_GROUP 256 "${once[@]}" ${sizes[@]+"${sizes[@]}"}
part start 60 "${run[@]}" --methods moco_v2 --parts start memory --rounds 2 --paths 1300000 ${sizes[@]+"${sizes[@]}"}
part views 60 "${views[@]}"

"$python" tools/benchmark.py --table "$figures" ${troubles[@]+"${troubles[@]}"} 2>&1 | tee "$results/table.md"
say "done; figures, table and log are in $results"
