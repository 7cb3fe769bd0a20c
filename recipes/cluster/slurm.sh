#!/bin/bash
# SLURM: one torchrun a node, any number of nodes. In an environment that has st_fast:
#
#     sbatch --nodes=4 recipes/cluster/slurm.sh recipes/sit_xl.toml --data.path=/shared/imagenet256
#
# Two minutes before the time limit (--signal below), and when the job is preempted, SLURM sends SIGTERM to every
# process of the step. All ranks save at the same step, and the job queues itself again, to continue where it was.
# A preemption leaves the partition's GraceTime for that; without one SLURM kills and requeues the job at once, and
# it continues from its last checkpoint. `scancel JOB` ends it for good.
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

# torchrun ends with 1 whatever its ranks ended with, so the line of an interruption is looked for in what they print.
told=$(mktemp)
trap 'rm -f "$told"' EXIT
status=0
# srun does not take --cpus-per-task over from sbatch (SLURM 22.05 and newer).
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head_node:${RENDEZVOUS_PORT:-29400}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts="${MAX_RESTARTS:-0}" \
    -m st_fast.train "$@" 2>&1 | sed -u "/the same command continues/w $told" || status=$?

# A preemption in the first seconds ends torchrun before it can say anything; SLURM itself knows of that one.
if [ "$status" -ne 0 ] && { [ -s "$told" ] || scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
