#!/bin/bash
# Finetune TinyLLaVA under DeepSpeed ZeRO on any number of nodes; requeued, it continues.
#
#   sbatch slurm/finetune_tinyllava.sh
#   sbatch --nodes=2 slurm/finetune_tinyllava.sh --config configs/tinyllava_full_zero3.yaml
#
# With nothing else: configs/tinyllava_lora_zero2.yaml where there are GPUs, configs/tinyllava_quickstart.yaml
# where there are none (an error with TELLTALE_NEED_GPU=1). Arguments go to launch/finetune_mlm.py, which
# torchrun starts: DeepSpeed's own launcher would need ssh between the nodes.
#SBATCH --job-name=telltale-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
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
train_job launch/finetune_mlm.py configs/tinyllava_lora_zero2.yaml configs/tinyllava_quickstart.yaml "$@"
