#!/bin/bash
# Submit everything from images to a report, as jobs that wait for each other:
#
#   shard -> audit -> train -> calibrate -> evaluate, finetune -> report
#
#   bash slurm/pipeline.sh --name genimage --layout genimage --source /data/GenImage --val-labels LOC_val_solution.csv
#   bash slurm/pipeline.sh --name small ... --for-train --train.epochs 2 --for-finetune --train.epochs 1
#   bash slurm/pipeline.sh --status runs/genimage
#
# Arguments before --for-train go to launch/shard.py, those behind it to launch/train.py, those behind
# --for-finetune to launch/finetune_mlm.py, those behind --for-questions to launch/make_vqa.py. Also:
#   --name NAME     data/NAME, data/NAME-vqa, runs/NAME and runs/NAME-explainer (default: genimage)
#   --tasks N       of the sharding (default: 8)
#   --nodes N       of training and finetuning (default: 1)
#   --no-finetune   leave the explainer out
# With TELLTALE_DATA and TELLTALE_RUNS (slurm/site.env) the folders are there, not in data/ and runs/.
# Where a stage fails, those behind it are cancelled (but the report comes without the explainer), and
# the last job, which always runs, says which it was. Submitted again, finished work is not done again.
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

name=genimage tasks=8 nodes=1 finetune=1
shard=() train=() tune=() questions=()
into=shard

status() {
  local folder=$1/slurm stage job files bad failed='' state
  [[ -f $folder/jobs ]] || die "$folder/jobs: no such file; --status wants the run folder of a pipeline"
  while read -r stage job; do
    files=("$folder/$stage".*.exit)
    bad=''
    [[ ! -e ${files[0]} ]] || bad=$(grep -lvx 0 "${files[@]}" | head -n 1) || true
    if squeue --noheader --jobs="$job" --format=%T 2> /dev/null | grep -q .; then
      state=$(squeue --noheader --jobs="$job" --format=%T | sort | uniq -c | awk '{printf "%s%s", sep, tolower($2) ($1 > 1 ? " x" $1 : ""); sep=", "}')
    elif [[ -n $bad ]]; then
      state="failed, code $(< "$bad")"
    elif [[ -e ${files[0]} ]]; then
      state="done"
    elif [[ -n $failed ]]; then
      state="not run, since $failed failed"
    else
      state="ended without a word: cancelled, out of time or lost"
    fi
    printf '%-10s job %-8s %s\n' "$stage" "$job" "$state"
    if [[ -z $failed && ($state == failed* || $state == ended*) ]]; then
      failed=$stage
      # shellcheck disable=SC2012 # names of ours
      log=$(ls -t "$folder/$stage"-*.out 2> /dev/null | head -n 1) || true
    fi
  done < "$folder/jobs"
  if [[ -n $failed ]]; then
    echo "failed: $failed; its log is ${log:-missing}"
    [[ -z ${log:-} ]] || grep -h '^error: ' "$log" | tail -n 1
    return 1
  fi
}

while (($#)); do
  case $1 in
    --for-train) into=train ;;
    --for-finetune) into=tune ;;
    --for-questions) into=questions ;;
    --name | --tasks | --nodes | --status)
      (($# > 1)) || die "$1: expected a value after it"
      case $1 in
        --name) name=$2 ;;
        --tasks) tasks=$2 ;;
        --nodes) nodes=$2 ;;
        --status)
          status "$2"
          exit
          ;;
      esac
      shift
      ;;
    --no-finetune) finetune='' ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      case $into in
        shard) shard+=("$1") ;;
        train) train+=("$1") ;;
        tune) tune+=("$1") ;;
        questions) questions+=("$1") ;;
      esac
      ;;
  esac
  shift
done

command -v sbatch > /dev/null || die "sbatch: not found; this machine has no Slurm (make quickstart runs the whole way without it)"
[[ $tasks =~ ^[1-9][0-9]*$ && $nodes =~ ^[1-9][0-9]*$ ]] || die "--tasks $tasks --nodes $nodes: expected numbers of at least 1"
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || die "--name $name: expected letters, digits, dots, dashes"
((${#shard[@]})) || die "nothing to shard: give --layout and --source, see --help"
load_site

datasets=${TELLTALE_DATA:-data} runs=${TELLTALE_RUNS:-runs}
data=$datasets/$name run=$runs/$name vqa=$datasets/$name-vqa explainer=$runs/$name-explainer
tuning=configs/tinyllava_lora_zero2.yaml
weights=$(sed -n 's/^ *weights: *\([^ ]*\).*/\1/p' "$tuning")
if [[ -n $finetune && ${TELLTALE_NEED_GPU:-} == 1 && ! -d $weights && " ${tune[*]} " != *" --config"* && " ${tune[*]} " != *" --model.weights"* ]]; then
  die "$weights: no such folder, and finetuning starts from it; put the checkpoint there (docs/tinyllava.md), or give --no-finetune"
fi
mkdir -p "$run/slurm" || die "$run/slurm: cannot be made; set TELLTALE_RUNS in slurm/site.env"
logs=$(cd "$run/slurm" && pwd)
rm -f "$logs"/*.exit "$logs/jobs" "$logs/status.txt"
shard+=(--output "$data")

# What needs no GPU takes a part of a node, and may go elsewhere; stage.sh asks for no more by itself.
processors=() whole=(--exclusive --mem=0)
[[ -z ${TELLTALE_CPU_PARTITION:-} ]] || processors=(--partition="$TELLTALE_CPU_PARTITION")

# submit STAGE DEPENDENCY OPTION... -- SCRIPT ARGUMENT...
submit() {
  local stage=$1 after=$2 options=() job
  shift 2
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  [[ -z $after ]] || options+=("--dependency=$after" --kill-on-invalid-dep=yes)
  job=$(TELLTALE_STAGE=$logs/$stage sbatch --parsable --job-name="$name-$stage" \
    --output="$logs/$stage-%j.out" "${options[@]}" "$@") || {
    echo "error: sbatch refused the stage $stage; nothing is queued" >&2
    [[ ! -f $logs/jobs ]] || cut -d ' ' -f 2 "$logs/jobs" | xargs scancel
    return 2
  }
  job=${job%%;*} # a cluster's name may follow
  echo "$stage $job" >> "$logs/jobs"
  echo "$job"
}

sharded=$(submit shard '' "${processors[@]}" --array="0-$((tasks - 1))" -- slurm/shard_genimage.sh "${shard[@]}")
# The array's last task merges; should two have ended at once without seeing each other, this does.
audited=$(submit audit "afterok:$sharded" "${processors[@]}" -- slurm/stage.sh launch/shard.py "${shard[@]}" --finish \
  --then launch/audit.py --shards "$data")
trained=$(submit train "afterok:$audited" --nodes="$nodes" -- slurm/train_resnet50.sh \
  --data.shards "$data" --run.dir "$run" "${train[@]}")
calibrated=$(submit calibrate "afterok:$trained" "${whole[@]}" -- slurm/stage.sh launch/calibrate.py --checkpoint "$run" --data "$data")
evaluated=$(submit evaluate "afterok:$calibrated" -- slurm/evaluate.sh --checkpoint "$run/best.pt" --data "$data" \
  --split test --output "$run/evaluation")
before=afterok:$evaluated
report=(--evaluation "$run/evaluation" --checkpoint "$run" --data "$data" --split test)
if [[ -n $finetune ]]; then
  asked=$(submit questions "afterok:$calibrated" "${processors[@]}" -- slurm/stage.sh launch/make_vqa.py --shards "$data" --output "$vqa" "${questions[@]}")
  tuned=$(submit finetune "afterok:$asked" --nodes="$nodes" -- slurm/finetune_tinyllava.sh \
    --data.conversations "$vqa/conversations.json" --data.val "$vqa/val.json" \
    --evaluate.benchmarks "[$vqa/true_false.json, $vqa/multiple_choice.json]" --run.dir "$explainer" "${tune[@]}")
  # Whatever became of the explainer, the detector has its report.
  before=afterok:$evaluated,afterany:$tuned
  report+=(--explainer "$explainer" --explainer-optional)
fi
reported=$(submit report "$before" "${processors[@]}" -- slurm/stage.sh launch/report.py "${report[@]}")
all=$(cut -d ' ' -f 2 "$logs/jobs" | paste -s -d :)
last=$(sbatch --parsable --job-name="$name-status" --output="$logs/status.txt" --dependency="afterany:$all" \
  --nodes=1 --ntasks=1 --time=00:10:00 slurm/pipeline.sh --status "${logs%/slurm}")

column -t "$logs/jobs" 2> /dev/null || cat "$logs/jobs"
cat << END

logs:    $logs/STAGE-JOB.out
now:     bash slurm/pipeline.sh --status $run
the end: $run/evaluation/report.html (job $reported); $logs/status.txt says how all ended (job ${last%%;*})
cancel:  scancel $(cut -d ' ' -f 2 "$logs/jobs" | paste -s -d ' ')
END
