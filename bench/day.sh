#!/usr/bin/env bash
# bench/day.sh 1|2|3: one of the three calls of a GPU day, each in less than ten minutes; bench/GPU-DAY.md says more.
# The same call again goes on where it stopped. Rows go to $OUT, or bench/results.
#
#   PYTHON      the environment (python3)
#   DAY_SHARE   of the minutes: 0.1 rehearses with a tenth of them
set -uo pipefail
call=${1:-}
case $call in 1 | 2 | 3) ;; *) echo "usage: bench/day.sh 1|2|3" >&2; exit 2 ;; esac
out=$(readlink -m "${OUT:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
exec 9>"$out/day.lock" || exit 2
busy=0
flock -n 9 || busy=$?
[ $busy -ne 1 ] || { echo "$out: another bench/day.sh is measuring here; wait for it, or set another OUT" >&2; exit 2; }
pack=build/pack
start=$SECONDS

last=560 # seconds after which a call is over; a part has 15 more to end, and at 600 all may be killed
code=0

seconds() { # seconds MOST: so many, or what is left
  local left=$((last - (SECONDS - start)))
  awk "BEGIN {most = $1 < $left ? $1 : $left; printf \"%.0f\", most * ${DAY_SHARE:-1}}"
}
worst() { # worst CODE: kept as python -m bench keeps it, 2 before 3 before all others
  case $1:$code in 0:* | *:2) ;; 2:* | *:0 | *:1) code=$1 ;; esac
}
dies_too=() # with this script, however that ends: an orphan would measure beside the next call
if command -v setpriv >/dev/null; then dies_too=(setpriv --pdeathsig KILL --); fi
bench() { "${dies_too[@]}" "$python" -m bench "$@"; }
day() { # day SECONDS PARTS… OPTIONS…: what is not ok is in its row, and the call goes on
  local budget ended=0
  budget=$(seconds "$1")
  shift
  if [ "$budget" -lt 5 ]; then
    echo "no time is left for $*; run the same command again"
    worst 3
    return
  fi
  bench --seconds "$budget" --results "$out" --keep "$@" || ended=$?
  worst $ended
  echo "== $((SECONDS - start)) s: $*"
}

if compgen -G "$pack/wheels/*.whl" >/dev/null; then
  site=${TMPDIR:-/tmp}/st_fast-site
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
    $pack/wheels/*.whl || exit 2
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
if compgen -G "$pack/csrc/*.so" >/dev/null; then cp $pack/csrc/*.so st_fast/; fi
"$python" -c "import st_fast.kernels" || exit 2  # compiles csrc where it was not brought along
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONUNBUFFERED=1
echo "== $((SECONDS - start)) s: ready"

case $call in
1) # right, and the headline
  ended=0
  TORCHINDUCTOR_COMPILE_THREADS=2 bench build truth attention compiled ops optimiser launch-overhead step first-step \
    schedules choices profile sweep convergence --small --jobs 8 --seconds "$(seconds 90)" \
    --results "$out/rehearsal" || ended=$?
  worst $ended
  echo "== $((SECONDS - start)) s: rehearsal"
  timeout "$(seconds 150)" "$python" -m pytest -q -n 8 tests/kernels/test_gpu.py tests/train/schedule/test_gpu.py \
    tests/model/test_attention.py tests/model/test_fp8.py tests/train/test_updates.py 2>&1 | tee "$out/tests.txt" | tail -n 40 || worst 1
  echo "== $((SECONDS - start)) s: tests"
  day 80 build attention truth
  day 90 step --only "XL/2, plain"
  day 150 step --only "B/2"
  ;;
2) # the rest of the throughput, and each switch
  day 110 step --only "XL/2"
  day 40 profile --only "XL/2"
  day 90 ops optimiser
  day 130 schedules
  day 190 choices
  ;;
3) # does it train?
  if [ ! -f data/cifar10-8x8/manifest.json ]; then
    mkdir -p data
    if [ -f $pack/cifar10-8x8.tar.xz ]; then "$python" -m tarfile -e $pack/cifar10-8x8.tar.xz data; fi
  fi
  day 520 convergence
  day $last step first-step truth choices schedules compiled launch-overhead sweep
  ;;
esac
exit $code
