#!/bin/bash
# SLURM: one torchrun a node, any number of nodes. Submit with
#
#     sbatch --nodes=4 recipes/cluster/slurm.sh recipes/sit_xl.toml --data.path=/shared/imagenet256
#
# The job is told to end two minutes before its time is over or it is preempted; all ranks then save at the same step
# and the job is queued again, to continue where it was.
#SBATCH --job-name=st_fast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=st_fast-%j.log
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # how long torchrun waits for its ranks to save (torch >= 2.13; else 30 s)
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

status=0
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${GPUS_PER_NODE:-8}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head_node:${RENDEZVOUS_PORT:-29400}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts="${MAX_RESTARTS:-0}" \
    -m st_fast.train "$@" || status=$?

# torchrun ends with 1 whatever its ranks ended with: "exitcode : 75" in its report is an interruption that was saved.
if [ "$status" -ne 0 ] && grep -q "the same command continues" "st_fast-$SLURM_JOB_ID.log"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
