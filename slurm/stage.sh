#!/bin/bash
# Run one or several of telltale's commands on one node, one after the other: the small stages of a pipeline.
#
#   sbatch slurm/stage.sh launch/audit.py --shards data/genimage
#   sbatch slurm/stage.sh launch/calibrate.py --checkpoint RUN --data DATA --then launch/predict.py ...
#SBATCH --job-name=telltale-stage
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
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
while (($#)); do
  words=()
  while (($#)) && [[ $1 != --then ]]; do
    words+=("$1")
    shift
  done
  (($# == 0)) || shift
  on_head "$python" "${words[@]}"
done
