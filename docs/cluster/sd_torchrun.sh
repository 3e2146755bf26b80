#!/bin/bash
# Fine-tuning on one machine with eight GPUs under torchrun: bash docs/cluster/sd_torchrun.sh

# stop at the first command that fails, and at a variable that is not set
set -eu

# GPUs of this machine
GPUS=${GPUS:-8}

# a folder of this experiment alone, which a second one cannot go on from by accident
RUN=${RUN:-runs/sd}

# one thread a process: the readers are processes of their own
export OMP_NUM_THREADS=1

# torchrun starts one process a GPU and names the ranks; Lightning takes them from it. The number
# of devices must be said as well. bf16 is the precision of sd.yaml; the latents' cache lies in
# $RUN/cache and is filled by all processes together before the first step.
torchrun --standalone --nproc-per-node "$GPUS" run.py fit --config sd.yaml \
    --trainer.default_root_dir "$RUN" \
    --trainer.devices "$GPUS" \
    --trainer.strategy ddp
