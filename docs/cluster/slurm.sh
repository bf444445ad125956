#!/bin/bash
# Two machines of eight GPUs under Slurm: sbatch docs/cluster/slurm.sh
# One task on each machine; torchrun starts a process for each GPU and starts them again when one dies.
#SBATCH --job-name=d2ext
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Two minutes before the end the processes are asked to stop, and save; the job is queued again.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.txt

set -euo pipefail
# All machines have to see these.
CONFIG=htc_R_50_FPN_1x_coco
DATA=${DATA:-/shared/mydata}
OUTPUT=${OUTPUT:-/shared/output/$SLURM_JOB_NAME}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4
srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_PER_NODE" --max-restarts=10 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \
    -m d2ext train "$CONFIG" --data "$DATA" --resume OUTPUT_DIR="$OUTPUT"
