# shellcheck shell=bash
# What surrounds the ranks of a SLURM job, sourced by its batch script:
#
#   begin_attempt RUN          before srun: go to the run folder, make attempts/NNN there
#   srun ... --output="$CAUC_ATTEMPT/rank-%t.log" python -m cauc_dist.job .
#   end_attempt $?             after it: done, failed, or the same job again
#
# An attempt is one start of the job's ranks. Its folder holds `job` (who and where), and of every rank its log, its
# host from the beginning and its exit code at the end: a rank without one was killed. rank-R.missing: whom R missed, by
# number. `end` holds the verdict:
#
#   done                       every rank ended with 0
#   failed CODE                a rank ended with a code that is not to be tried again
#   cancelled                  by the user
#   again stopped|crashed CHECKPOINT    and how: requeued (by SLURM itself), resubmitted as ID, given up
#
# An attempt whose node was lost has no verdict: SLURM has queued the job again. The same again at most CAUC_MAX_TRIES (3)
# times without a new checkpoint between. CAUC_REQUEUE_ON: exit codes that are tried again (5 stopped by a signal, 6 a peer
# is gone, 134 abort, 135 bus error, 137 killed, 139 segmentation fault).

# Variables of other launchers, from a login shell or the job that submitted this one, would win over SLURM's.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT
unset TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RESTART_COUNT TORCHELASTIC_RUN_ID

begin_attempt() {
  cd -- "$1" || exit 2
  trap : TERM INT USR1 USR2 # bash outlives srun, and the ranks hear them all the same
  local n=1 folder
  mkdir -p attempts || exit 2
  while true; do
    folder=attempts/$(printf %03d $n)
    mkdir "$folder" 2> /dev/null && break
    if [ ! -e "$folder" ]; then
      echo "error: $PWD/$folder cannot be made; wanted room, and the right to write. Free space, then launch resume." >&2
      exit 2
    fi
    n=$((n + 1))
  done
  export CAUC_ATTEMPT=$folder
  CAUC_BEGAN_AT=$(_checkpoint)
  # glibc maps and unmaps every activation anew: a third of a step's time on CPUs.
  export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1099511627776}"
  {
    echo "id=$(_job_id)"
    echo "nodes=$SLURM_JOB_NODELIST"
    echo "tasks=$SLURM_NTASKS"
    echo "restarts=${SLURM_RESTART_COUNT:-0}"
    echo "began=$(date +%s)"
  } > "$CAUC_ATTEMPT/job"
}

end_attempt() {
  local rc=$1 codes checkpoint verdict tries
  if _is_superseded; then
    echo "attempt ${CAUC_ATTEMPT#*/}: SLURM has started the job elsewhere meanwhile"
    exit "$rc"
  fi
  codes=$(cat "$CAUC_ATTEMPT"/rank-*.exit 2> /dev/null)
  checkpoint=$(_checkpoint)
  if [ "$(grep -cx 0 <<< "$codes")" = "$SLURM_NTASKS" ]; then
    _verdict "done"
    exit 0
  fi
  if grep -qxF "$(_job_id)" cancelled 2> /dev/null || _cancelled; then
    _verdict cancelled
    exit "$rc"
  fi
  verdict=$(_kind "$rc" "$codes")
  if [ "${verdict%% *}" = failed ]; then
    _verdict "$verdict"
    exit "$rc"
  fi
  verdict="again $verdict $checkpoint"
  if _is_requeued; then
    _verdict "$verdict" "requeued by SLURM itself" # preempted, or a node was lost: nobody's fault
    exit "$rc"
  fi
  _suspects
  tries=$(($(_times "$verdict") + 1))
  if [ "$checkpoint" = "$CAUC_BEGAN_AT" ] && [ "$tries" -ge "${CAUC_MAX_TRIES:-3}" ]; then
    _verdict "$verdict" "given up: $tries times without a new checkpoint"
    exit "$rc"
  fi
  _again "$verdict"
  exit "$rc"
}

# The newest checkpoint, or none.
_checkpoint() {
  local newest
  newest=$(find checkpoints -maxdepth 1 -name 'step-*' 2> /dev/null | sort | tail -n 1)
  newest=${newest##*/}
  echo "${newest:-none}"
}

# stopped, crashed or failed CODE, from srun's exit code and the ranks' own.
_kind() {
  local rc=$1 codes=$2 again=" ${CAUC_REQUEUE_ON:-5 6 134 135 137 139} " code kind=stopped early=""
  # SIGUSR2 or SIGTERM, before Python listened to them.
  [ "$rc" = 140 ] || [ "$rc" = 143 ] && early=1
  if [ -z "$early" ] && ! ls attempts/*/rank-*.host > /dev/null 2>&1; then
    echo "failed $rc" # not one rank ever began: the command itself is wrong
    return
  fi
  if [ -n "$(find "$CAUC_ATTEMPT" -name 'rank-*.exit' -empty)" ]; then
    echo "failed $rc" # a full disk took its text
    return
  fi
  for code in $codes; do
    [ "$code" = 0 ] && continue
    if [ "${again#* "$code" }" = "$again" ]; then
      echo "failed $code"
      return
    fi
    [ "$code" = 5 ] || kind=crashed
  done
  # A rank without an exit code was killed; by which signal, srun's code says.
  if [ -z "$early" ] && [ "$(wc -w <<< "$codes")" != "$SLURM_NTASKS" ]; then
    kind=crashed
    [ "$rc" -gt 128 ] && [ "${again#* "$rc" }" = "$again" ] && kind="failed $rc"
  fi
  echo "$kind"
}

# How often that was the verdict, since launch queued the run last: `launch resume` begins to count anew.
_times() {
  local end since=() times=0
  [ -e jobs.jsonl ] && since=(-newer jobs.jsonl)
  while read -r end; do
    if grep -qxF "$1" "$end" && ! grep -q "SLURM itself" "$end"; then times=$((times + 1)); fi
  done < <(find attempts -name end "${since[@]}")
  echo "$times"
}

# Hosts on which a rank was killed, unless that is every host. Of ranks without an exit code, those that a peer missed:
# srun kills the others too, where they have not ended WAIT seconds after the first (they wait for a packet that was lost).
_suspects() {
  local killed missed hosts
  killed=$(for rank in "$CAUC_ATTEMPT"/rank-*.host; do [ -e "${rank%.host}.exit" ] || echo "${rank%.host}"; done)
  missed=$(sed "s|^|$CAUC_ATTEMPT/rank-|" "$CAUC_ATTEMPT"/rank-*.missing 2> /dev/null | grep -xF "$killed")
  hosts=$(for rank in ${missed:-$killed}; do cat "$rank.host" 2> /dev/null; done | sort -u) # where none began: no file
  if [ "$(wc -w <<< "$hosts")" = "$SLURM_JOB_NUM_NODES" ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then hosts=""; fi
  printf '%s' "${hosts:+$hosts$'\n'}" > "$CAUC_ATTEMPT/suspects"
}

# Hosts that were suspected twice.
_bad_nodes() { cat attempts/*/suspects 2> /dev/null | sort | uniq -d; }

# The job once more: by requeueing, which keeps its id; where it cannot be, or nodes are to be left out, as a new job.
_again() {
  local verdict=$1 bad
  bad=$(_bad_nodes)
  if [ -n "$bad" ] && cat "$CAUC_ATTEMPT"/rank-*.host | grep -qxF "$bad"; then # else they are left out already
    if _resubmit "$verdict" "$(paste -sd, - <<< "$bad")"; then return; fi # it fails where no other nodes are left
  fi
  if command -v scontrol > /dev/null; then
    _verdict "$verdict" requeued
    scontrol requeue "$(_job_id)" && return
    if _is_requeued; then return; fi # in this very moment
  fi
  if [ -n "$bad" ] && _resubmit "$verdict" "$(paste -sd, - <<< "$bad")"; then return; fi
  _resubmit "$verdict" "" || _verdict "$verdict" "given up: neither scontrol nor sbatch works here"
}

# A new job, without the nodes $2, that may start only when this one is over: the run folder is never two jobs'.
_resubmit() {
  local verdict=$1 bad=$2 script=${CAUC_SCRIPT:-$0} before id asked without
  before=$(_job_id)
  _asked
  without=$bad${bad:+${without:+,}}$without
  id=$(cd -- "$SLURM_SUBMIT_DIR" && _clean sbatch --parsable --dependency="afterany:$before" "${asked[@]}" \
    ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} ${without:+--exclude="$without"} "$script") || return
  id=${id%%;*}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  if [ -e "$SLURM_SUBMIT_DIR/slurm/${before}_submitted.pkl" ]; then
    ln -f "$SLURM_SUBMIT_DIR/slurm/${before}_submitted.pkl" "$SLURM_SUBMIT_DIR/slurm/${id}_submitted.pkl"
  fi
  echo "$id" >> resubmitted
  _verdict "$verdict" "resubmitted as $id${bad:+ without $bad}"
}

# What this job was given, by its script or by hand beside it: options in `asked`, the nodes to leave out in `without`.
# SLURM tells neither a job's --signal nor its --requeue, --mail-* and the like: those are the script's.
_asked() {
  local limit features reservation tres log name variable
  asked=()
  IFS='|' read -r limit features reservation tres without \
    < <(squeue -h -j "$(_job_id)" -o '%l|%f|%v|%b|%x' 2> /dev/null)
  read -r log < <(squeue -h -j "$(_job_id)" -O STDOUT:4096 2> /dev/null)
  case $log in *"$SLURM_JOB_ID"*) log="" ;; esac # newer ones fill the id in
  [ -n "${without//(null)/}" ] || without=$(_in_script exclude)
  case ",$(_in_script partition)," in *",$SLURM_JOB_PARTITION,"*) ;; *) _ask partition "$SLURM_JOB_PARTITION" ;; esac
  for name in job-name:JOB_NAME account:JOB_ACCOUNT qos:JOB_QOS nodes:JOB_NUM_NODES ntasks:NTASKS \
    ntasks-per-node:NTASKS_PER_NODE cpus-per-task:CPUS_PER_TASK mem:MEM_PER_NODE mem-per-cpu:MEM_PER_CPU \
    gpus:GPUS gpus-per-node:GPUS_PER_NODE gpus-per-task:GPUS_PER_TASK; do
    variable=SLURM_${name#*:}
    _ask "${name%:*}" "${!variable:-}"
  done
  if [ -z "${SLURM_GPUS_PER_NODE:-}" ]; then _ask gres "${tres#gres[:/]}"; fi
  _ask time "$limit"
  _ask constraint "$features"
  _ask reservation "$reservation"
  _ask output "$log"
}

_ask() { case $2 in "" | "(null)" | N/A) ;; *) asked+=("--$1=$2") ;; esac }

# The value of an option in the batch script; submitit quotes what a shell would read.
_in_script() { sed -n "s/^#SBATCH --$1=//p" "$script" | tail -n 1 | tr -d "\"'"; }

# N, or N_K: SLURM_JOB_ID of one task is N, which SLURM's commands take for all tasks.
_job_id() { echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }

_verdict() {
  printf '%s\n' "$@" > "$CAUC_ATTEMPT/.end" && mv "$CAUC_ATTEMPT/.end" "$CAUC_ATTEMPT/end"
  echo "attempt ${CAUC_ATTEMPT#*/}: $*"
}

# Whether it was scancel that ended the ranks: the job is no longer RUNNING then, has time left, and SLURM does not
# count one more restart of it, as it does at once where it preempts a job or has lost one of its nodes.
_cancelled() {
  local state left
  read -r state left < <(squeue -h -j "$(_job_id)" -o '%T %L' 2> /dev/null)
  case $left in 0:00 | INVALID) return 1 ;; esac # its time is over
  [ -n "$state" ] && [ "$state" != RUNNING ] && ! _is_requeued
}

_is_requeued() {
  local restarts
  read -r restarts < <(squeue -h -j "$(_job_id)" -O RestartCnt 2> /dev/null)
  [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

# Whether the same job has begun a later attempt: this one's node was cut off, and the job is not its business any more.
_is_superseded() {
  local other mine=$((10#${CAUC_ATTEMPT#*/}))
  for other in attempts/[0-9]*; do
    if [ $((10#${other#*/})) -gt "$mine" ] && grep -qx "id=$(_job_id)" "$other/job" 2> /dev/null; then return 0; fi
  done
  return 1
}

# Run a command without this job's own variables: sbatch hands them to the new job.
_clean() {
  local name drop=()
  for name in $(compgen -e); do
    case $name in
      SLURM_CONF) ;;
      SLURM_* | SLURMD_* | SBATCH_* | PMI* | OMPI_* | CAUC_ATTEMPT) drop+=(-u "$name") ;;
    esac
  done
  env "${drop[@]}" "$@"
}
