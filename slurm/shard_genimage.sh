#!/bin/bash
# Shard a data set as an array: each task writes its slice, the last one to end merges.
#
#   sbatch --array=0-15 slurm/shard_genimage.sh --source /data/GenImage --val-labels LOC_val_solution.csv
#
# Arguments go to launch/shard.py, after --layout genimage --output data/genimage, or TELLTALE_DATA/genimage
# (the last one given counts). A task that was killed is requeued alone and ends with the same bytes.
#SBATCH --job-name=telltale-shard
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=%x-%A_%a.out
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
array_job "$python" launch/shard.py --workers "$SLURM_CPUS_PER_TASK" --layout genimage --output "${TELLTALE_DATA:-data}/genimage" "$@"
