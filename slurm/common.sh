# shellcheck shell=bash
# What the batch scripts share: environment, preflight, launching, signals and requeueing.
#
# A script finds this file, sources it, and calls one function. Everything specific to a site comes
# from environment variables or slurm/site.env (see site.env.example); the environment wins.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" # relative paths in configurations and flags are the repository's

say() { echo "$(date '+%F %T') ${SLURM_JOB_NAME:-telltale} restart ${SLURM_RESTART_COUNT:-0}: $*"; }

die() {
  echo "error: $*" >&2
  exit 2
}

# ---- environment ----------------------------------------------------------------------

load_site() {
  local file=${TELLTALE_SITE:-$ROOT/slurm/site.env} given
  if [[ -f $file ]]; then
    given=$(export -p | grep -E '^declare -x (TELLTALE_|SBATCH_|NCCL_|GLOO_|WANDB_|HF_)' || true)
    set -a
    # shellcheck disable=SC1090
    source "$file" || die "$file: bash cannot read it; correct it after site.env.example"
    set +a
    eval "$given" # what the environment said before wins
  elif [[ -n ${TELLTALE_SITE:-} ]]; then
    die "TELLTALE_SITE=$file: no such file; name a copy of slurm/site.env.example"
  fi
}

# A batch script's shell is no login shell: where `module` was not exported with the environment, the
# file that defines it has to be read. Neither it nor `module` itself is written for `set -eu`.
load_modules() {
  local file
  set +eu
  for file in "$MODULESHOME/init/bash" "$LMOD_PKG/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh \
    /usr/share/{lmod/lmod,modules}/init/bash; do
    ! type module > /dev/null 2>&1 || break
    # shellcheck disable=SC1090
    [[ ! -r $file ]] || source "$file"
  done
  type module > /dev/null 2>&1 || die "TELLTALE_MODULES=$TELLTALE_MODULES: this node has no module command; remove it"
  # shellcheck disable=SC2086 # several names
  module load $TELLTALE_MODULES || die "TELLTALE_MODULES=$TELLTALE_MODULES: module load failed; \`module avail\` lists what there is"
  set -eu
}

load_environment() {
  [[ -z ${TELLTALE_MODULES:-} ]] || load_modules
  if [[ -n ${TELLTALE_SETUP:-} ]]; then
    set +eu # activate scripts read variables that are not set
    eval "$TELLTALE_SETUP" || die "TELLTALE_SETUP=$TELLTALE_SETUP: failed; correct it in slurm/site.env"
    set -eu
  fi
  inside=()
  container_options=()
  local mounts=$ROOT:$ROOT folder
  for folder in "${TELLTALE_DATA:-}" "${TELLTALE_RUNS:-}" "${TELLTALE_SCRATCH:-}"; do
    [[ $folder != /* ]] || mounts+=,$folder:$folder
  done
  mounts+=${TELLTALE_MOUNTS:+,$TELLTALE_MOUNTS}
  if [[ -n ${TELLTALE_CONTAINER:-} ]]; then
    python=${TELLTALE_PYTHON:-python3}
    case ${TELLTALE_CONTAINER_RUNTIME:-apptainer} in
      apptainer)
        # --nv does nothing but warn where there is no GPU.
        inside=(apptainer exec --nv --bind "$mounts" "$TELLTALE_CONTAINER")
        ;;
      pyxis)
        container_options=(--container-image="$TELLTALE_CONTAINER" --container-workdir="$ROOT"
          --container-mounts="$mounts")
        ;;
      *) die "TELLTALE_CONTAINER_RUNTIME=$TELLTALE_CONTAINER_RUNTIME: expected apptainer or pyxis" ;;
    esac
  else
    python=${TELLTALE_PYTHON:-${TELLTALE_VENV:-$ROOT/.venv}/bin/python}
    [[ -x $python ]] || die "$python: no such program; run \`make venv\` in $ROOT, or set TELLTALE_VENV or TELLTALE_PYTHON in slurm/site.env"
  fi

  # Output line by line, or the log of a killed job lacks its end.
  export PYTHONUNBUFFERED=1
  # PyTorch's own threads come from train.threads; all other libraries would each take every core.
  threads_given=${OMP_NUM_THREADS:-}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # glibc keeps a heap per thread, and the decoding threads of a node would each hold on to one.
  export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-4}
  # It also returns large blocks at once, so that Pillow pays page faults for every image.
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-268435456}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1073741824}
  # Warnings name the interface or the peer that failed; INFO is thousands of lines.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # A rank whose peer has died must end, or the allocation idles until its time is up.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
  if [[ -n ${TELLTALE_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$TELLTALE_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$TELLTALE_INTERFACE}
  fi
  # torchrun hands these to its workers (by default it would die of USR1 and leave them), and gives
  # them this long to save before it kills them. Older torchruns do not look at the variables: there
  # the stop file must do.
  export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-240}
}

# The id scontrol wants. In an array the plain id of the last task means the whole array.
job_id() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# The fewest CPUs that any node of the job has: srun gives a task one unless it is told.
cpus_per_node() {
  echo "${SLURM_CPUS_PER_TASK:-$(tr ',' '\n' <<< "${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | head -n 1)}"
}

start_job() {
  # From now on, or a warning during preflight would kill this shell, and the job would count as failed.
  warned=''
  trap 'warned=1; say "warned"' USR1
  load_site
  # A pipeline asks how its stages ended; a requeued one ends again.
  [[ -z ${TELLTALE_STAGE:-} ]] || trap 'echo $? > "$TELLTALE_STAGE.${SLURM_ARRAY_TASK_ID:-0}.exit"' EXIT
  [[ -n ${SLURM_JOB_ID:-} ]] || die "this is a batch script: submit it with sbatch, or use launch/submit.py"
  load_environment
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # From the job's id, so that two jobs on a node do not meet; preflight has the next one. Below 32768,
  # from where on Linux gives ports to any connection.
  port=$((20000 + 2 * (SLURM_JOB_ID % 6000)))
  step_options=(--ntasks-per-node=1 --cpus-per-task="$(cpus_per_node)" --kill-on-bad-exit=1 --wait=60 --export=ALL)
  # Said again, or the step sees none of the job's GPUs.
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    if [[ -n ${TELLTALE_GRES:-} ]]; then
      step_options+=(--gres="$TELLTALE_GRES:$SLURM_GPUS_ON_NODE")
    else
      step_options+=(--gpus-per-node="$SLURM_GPUS_ON_NODE")
    fi
  fi
  step_options+=("${container_options[@]}")
  say "job $(job_id) on $SLURM_JOB_NODELIST, $ROOT"
}

processes_per_node() {
  echo "${TELLTALE_PROCESSES_PER_NODE:-$(on_head "$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
}

# One task on each node of the job.
on_nodes() { srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" "${step_options[@]}" "${inside[@]}" "$@"; }

# One task on the first node.
on_head() { srun --nodes=1 --ntasks=1 --nodelist="$head" "${step_options[@]}" "${inside[@]}" "$@"; }

# ---- training that is stopped, requeued and continued ------------------------------------

# train_job SCRIPT GPU_CONFIG CPU_CONFIG ARGUMENT...
train_job() {
  local script=$1 answer run processes config need_gpu=()
  [[ ${TELLTALE_NEED_GPU:-} != 1 ]] || need_gpu=(--need-gpu)
  answer=$(on_nodes "$python" launch/preflight.py --script "$script" --gpu-config "$2" --cpu-config "$3" \
    --names "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -s -d ,)" --head "$head" --port "$((port + 1))" "${need_gpu[@]}" -- "${@:4}") || fail_preflight $?
  { read -r run && read -r processes && read -r config; } <<< "$answer" ||
    die "preflight said ${answer:-nothing}, expected a run folder, a number of processes and a configuration"
  local arguments=("${@:4}")
  if [[ $config != - ]]; then
    arguments=(--config "$config" "${arguments[@]}")
    say "no --config given: $config"
    [[ $config != "$3" ]] || say "there is no GPU here, so it is what a CPU can train; TELLTALE_NEED_GPU=1 makes that an error"
  fi
  say "$run: $SLURM_NNODES x $processes processes"
  # An offloaded optimizer computes on the host, with all its cores.
  if [[ $script == launch/finetune_mlm.py && -z $threads_given ]]; then
    OMP_NUM_THREADS=$(($(cpus_per_node) / processes))
    ((OMP_NUM_THREADS > 0)) || OMP_NUM_THREADS=1
  fi
  [[ -z ${TELLTALE_SCRATCH:-} || $script != launch/train.py ]] || arguments+=(--data.cache_dir "$TELLTALE_SCRATCH")
  # Workers that stop or refuse leave quietly: exit.json has the verdict.
  export TELLTALE_VERDICT=file
  # The rendezvous carries the restart: a rank that outlived the last attempt must not join this one.
  supervise "$run" on_nodes "$python" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --max-restarts="${TELLTALE_MAX_RESTARTS:-2}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    "$script" "${arguments[@]}"
}

fail_preflight() {
  # srun gives the highest code of its tasks; 2 is preflight's own word, already explained.
  (($1 == 2)) && exit 2
  # TERM to the steps alone (143) is how clusters without user signals preempt; scancel ends this shell too.
  if [[ -n $warned ]] || (($1 == 143)); then
    requeue "stopped before it began"
  fi
  say "preflight ended with code $1: a node failed"
  exit 1
}

# supervise RUN COMMAND...: run it; on a warning ask it to stop, then requeue; judge by RUN/exit.json.
supervise() {
  local run=$1 pid code=0 verdict reason
  shift
  mkdir -p "$run"
  # torchrun reaches only the workers of its own node, and only with signals that it knows; a file
  # on shared storage reaches all. TERM is left alone: scancel must stay a cancel.
  rm -f "$run/exit.json" "$run/stop"
  trap 'warned=1; say "warned: asking $run to stop"; touch "$run/stop"' USR1
  [[ -z $warned ]] || requeue "stopped before it began"
  "$@" &
  pid=$!
  while true; do # a trap ends `wait` early
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2> /dev/null || break
  done
  verdict=$(exit_field "$run" code)
  reason=$(exit_field "$run" reason)
  case $verdict in
    0)
      rm -f "$run"/crashes.*
      say "finished"
      exit 0
      ;;
    2)
      say "not requeued: the command or its data must be corrected ($run/exit.json)"
      exit 2
      ;;
    75)
      if [[ -z $warned && $reason != SIG* ]]; then
        say "stopped by $run/stop; not requeued: submit the same again to continue"
        exit 75
      fi
      requeue "stopped and saved"
      ;;
    *)
      [[ -z $warned ]] || requeue "ended before it could save; the last checkpoint counts"
      crashed "$run" "$code"
      ;;
  esac
}

exit_field() {
  [[ -f $1/exit.json ]] || return 0
  sed -n "s/.*\"$2\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$1/exit.json" | head -n 1
}

requeue() {
  if ((${SLURM_RESTART_COUNT:-0} >= ${TELLTALE_MAX_REQUEUES:-100})); then
    say "not requeued: ${SLURM_RESTART_COUNT:-0} times already (TELLTALE_MAX_REQUEUES)"
    exit 75
  fi
  say "$1; requeued"
  scontrol requeue "$(job_id)" || {
    say "scontrol requeue failed; submit the same again to continue"
    exit 75
  }
  # Leaving before Slurm takes this shell down would count as the job's end.
  sleep 600
  exit 75
}

# A crash may be the machine's fault, so it is tried again; without a newer checkpoint it is ours.
crashed() {
  local run=$1 record=$1/crashes.$SLURM_JOB_ID newest before='' count=0
  newest=$(find "$run/checkpoints" -maxdepth 1 ! -name '.*' -printf '%f\n' 2> /dev/null | sort | tail -n 1) || true # none yet
  [[ ! -f $record ]] || read -r count before < "$record" || true
  [[ $newest == "$before" ]] || count=0
  count=$((count + 1))
  echo "$count $newest" > "$record"
  say "crashed with code $2"
  if ((count > ${TELLTALE_CRASH_REQUEUES:-2})); then
    say "not requeued: $count crashes without a new checkpoint (TELLTALE_CRASH_REQUEUES)"
    exit 1
  fi
  requeue "crash $count since the last checkpoint"
}

# ---- arrays -----------------------------------------------------------------------------

# task_share: "i/n" with i from 0, whatever numbers the array has.
task_share() {
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "this script is an array: submit it with --array=0-7"
  # shellcheck disable=SC2153 # they are not misspelt
  local from=$SLURM_ARRAY_TASK_MIN count=$SLURM_ARRAY_TASK_COUNT step=1
  ((count == 1)) || step=$(((SLURM_ARRAY_TASK_MAX - from) / (count - 1)))
  (((SLURM_ARRAY_TASK_ID - from) % step == 0 && from + step * (count - 1) == SLURM_ARRAY_TASK_MAX)) ||
    die "--array has $count tasks from $from to $SLURM_ARRAY_TASK_MAX, expected evenly spaced ones such as 0-7"
  echo "$(((SLURM_ARRAY_TASK_ID - from) / step))/$count"
}

# array_job COMMAND...: this task's share, then the merge if it was the last to end.
array_job() {
  local share log code=0
  share=$(task_share)
  log=$(mktemp)
  supervise_step "$log" on_head "$@" --task "$share" || code=$?
  ((code == 0)) || exit "$code"
  # Two last tasks may both merge: the second finds it done.
  if grep -qE 'all are there: now --finish|is finished already' "$log"; then
    supervise_step /dev/null on_head "$@" --finish
  fi
}

# supervise_step LOG COMMAND...: run a step that continues when it is run again; requeue on a warning.
supervise_step() {
  local log=$1 pid='' code=0
  shift
  # srun hands it to its task, which saves what it can.
  trap 'warned=1; say "warned: asking the step to stop"; [[ -z $pid ]] || kill -USR1 "$pid"' USR1
  [[ -z $warned ]] || requeue "stopped"
  "$@" > >(tee "$log") &
  pid=$!
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2> /dev/null || break
  done
  pid=''
  ((code == 0 || code == 2)) || [[ -z $warned ]] || requeue "stopped"
  return "$code"
}
