# Sourced by the batch scripts: what every task of a job needs to know.

# --- edit these four ------------------------------------------------------------------------------
PYTHON=${LONGCLIP_PYTHON:-.venv/bin/python}   # the environment's python; the same path on all nodes
RUNS=${LONGCLIP_RUNS:-runs}                   # where runs are kept: storage that all nodes share
SCRATCH=${LONGCLIP_SCRATCH:-${SLURM_TMPDIR:-/tmp}} # a disk of the node's own, for caches
FREE_GB=${LONGCLIP_FREE_GB:-5}                # wanted on the disk of RUNS before a job starts
# module load cuda                            # and whatever else your site wants
# --------------------------------------------------------------------------------------------------

# Rendezvous: all tasks derive the same address from the job, and two jobs on one node other ports.
export MASTER_ADDR=${LONGCLIP_MASTER:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Compiled kernels and other caches: thousands of small files that a shared disk would choke on.
CACHE=$SCRATCH/longclip-$SLURM_JOB_USER
export TRITON_CACHE_DIR=$CACHE/triton TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor
export TORCH_EXTENSIONS_DIR=$CACHE/extensions WANDB_CACHE_DIR=$CACHE/wandb

export PYTHONUNBUFFERED=1                     # a log shows the last line before a crash
export PYTHONFAULTHANDLER=1                   # and where it was
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1      # a dead peer ends the job instead of a hang
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5  # only where NCCL chooses the wrong network

LOGS=$RUNS/logs
mkdir -p "$LOGS"

# One task per GPU, one log per task, appended to when a job starts again; one dead task ends them all.
run() {
    srun --kill-on-bad-exit=1 --open-mode=append --output="$LOGS/%x-%j-%t.log" "$@"
}
