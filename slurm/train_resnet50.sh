#!/bin/bash
# Train the detector on any number of nodes; stopped, preempted or requeued, it continues exactly.
#
#   sbatch slurm/train_resnet50.sh
#   sbatch --nodes=4 --time=24:00:00 slurm/train_resnet50.sh --config configs/resnet50_genimage.yaml \
#       --train.global_batch 1024 --optim.lr 0.4
#
# With nothing else: configs/resnet50_genimage.yaml where there are GPUs, configs/quickstart.yaml
# where there are none. Arguments go to launch/train.py. Whole nodes are taken, with all their GPUs;
# docs/slurm.md says how to take less, and what else can be set.
#SBATCH --job-name=telltale-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
set -euo pipefail

# sbatch runs a copy from its spool; Slurm knows where the script was.
here=$(dirname "${BASH_SOURCE[0]}")
if [[ ! -f $here/common.sh ]]; then
  command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
  # Arguments follow the script, and both may hold spaces: it is the first path beside common.sh.
  script=${command%% *}
  while [[ ! -f ${script%/*}/common.sh && $script != "$command" ]]; do
    rest=${command:${#script}+1}
    script+=" ${rest%% *}"
  done
  here=${script%/*}
  if [[ ! -f $here/common.sh ]]; then
    echo "error: no common.sh beside the script that Slurm names, ${command:-nothing}; submit one of a checkout" >&2
    exit 2
  fi
fi
# shellcheck source=slurm/common.sh
source "$here/common.sh"

start_job
train_job launch/train.py configs/resnet50_genimage.yaml configs/quickstart.yaml "$@"
