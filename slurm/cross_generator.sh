#!/bin/bash
# The cross-generator matrix: an array of eight trainings, each tested on all; the last merges.
#
#   sbatch slurm/cross_generator.sh
#   sbatch --array=0-7%4 slurm/cross_generator.sh configs/protocols/leave_one_out.yaml --output runs/leave_one_out
#
# Arguments go to launch/protocol.py; with none, configs/protocols/cross_generator.yaml into
# runs/cross_generator. A task is requeued alone and continues its training.
#SBATCH --job-name=telltale-cross
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
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
(( $# )) || set -- configs/protocols/cross_generator.yaml --output "${TELLTALE_RUNS:-runs}/cross_generator"
array_job "$python" launch/protocol.py "$@" --processes "$(processes_per_node)"
