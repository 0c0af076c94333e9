#!/bin/bash
# Run one or several of telltale's commands on one node, one after the other: the small stages of a pipeline.
# Takes eight CPUs; for a GPU's work (calibrate, predict): sbatch --exclusive --mem=0, or --gpus-per-node=1.
#
#   sbatch slurm/stage.sh launch/audit.py --shards data/genimage
#   sbatch --exclusive --mem=0 slurm/stage.sh launch/calibrate.py --checkpoint RUN --data DATA --then ...
#SBATCH --job-name=telltale-stage
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
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
while (($#)); do
  words=()
  while (($#)) && [[ $1 != --then ]]; do
    words+=("$1")
    shift
  done
  (($# == 0)) || shift
  on_head "$python" "${words[@]}"
done
