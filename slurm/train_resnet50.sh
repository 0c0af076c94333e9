#!/bin/bash
# Train the detector on any number of nodes; stopped, preempted or requeued, it continues exactly.
#
#   sbatch slurm/train_resnet50.sh
#   sbatch --nodes=4 slurm/train_resnet50.sh --config configs/resnet50_genimage_4096.yaml
#
# With nothing else: configs/resnet50_genimage.yaml where there are GPUs (1,024 images a step, for a
# node of eight), configs/quickstart.yaml where there are none (an error with TELLTALE_NEED_GPU=1).
# Arguments go to launch/train.py. Whole nodes are taken, with all their GPUs; docs/slurm.md says how
# to take less, and what else can be set.
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
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
  # Arguments follow the script, and both may hold spaces: words are cut off until common.sh is beside it.
  while [[ ! -f ${script%/*}/common.sh && $script == *" "* ]]; do script=${script% *}; done
  here=${script%/*}
  [[ -f $here/common.sh ]] || { echo "error: Slurm names ${script:-no script}, without a common.sh beside it; submit a script of a checkout" >&2; exit 2; }
fi
# shellcheck source=slurm/common.sh
source "$here/common.sh"

start_job
train_job launch/train.py configs/resnet50_genimage.yaml configs/quickstart.yaml "$@"
