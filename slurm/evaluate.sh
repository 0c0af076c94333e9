#!/bin/bash
# Evaluate a checkpoint on one node, one process for each GPU.
#
#   sbatch slurm/evaluate.sh --checkpoint runs/resnet50_genimage/best.pt --data data/genimage --split test \
#       --output runs/resnet50_genimage/evaluation --report
#
# Arguments go to launch/evaluate.py.
#SBATCH --job-name=telltale-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
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
processes=$(processes_per_node)
if ((processes == 1)); then # keeps the exit code, which torchrun would turn into 1
  on_head "$python" launch/evaluate.py "$@"
else
  on_head "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" launch/evaluate.py "$@"
fi
