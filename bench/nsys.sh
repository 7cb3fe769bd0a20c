#!/usr/bin/env bash
# Profiles some steps of a run with Nsight Systems: one report for each stage that reaches them. docs/profiling.md
#
#   bench/nsys.sh recipes/sit_xl.toml --profile.start=20 --profile.steps=5 --data.path=data/imagenet256
#
# NSYS (nsys), NAME (profile: the reports' name) and RANKS (1: processes, a GPU each) come from the environment;
# whatever follows goes to the trainer.
set -euo pipefail
if [ $# -eq 0 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
fi
nsys=${NSYS:-nsys}
if ! command -v "$nsys" > /dev/null; then
    echo "bench/nsys.sh: $nsys is not installed; --profile.tool=torch needs only PyTorch" >&2
    exit 2
fi
exec "$nsys" profile \
    --capture-range=cudaProfilerApi --capture-range-end=repeat \
    --trace=cuda,nvtx,cublas,cudnn,osrt --cuda-graph-trace=node --sample=none --cpuctxsw=none \
    --force-overwrite=true --output="${NAME:-profile}" \
    torchrun --standalone --nproc-per-node "${RANKS:-1}" -m st_fast.train "$@" --profile.tool=nsys
