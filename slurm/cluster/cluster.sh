#!/usr/bin/env bash
# A real SLURM cluster of several nodes on one Linux machine: no systemd, no Docker, nothing changed on the host.
#
# A node is a set of Linux namespaces (net, uts, mount, pid): its own host name, address on a private bridge, processes
# and /dev/shm. All nodes share the file system. slurmctld, slurmdbd, MariaDB and munged run on the node `login`. All
# of it lives in one outer pid namespace; the process that holds it ($SITE/run/site.pid) is the only thing that this
# script leaves running on the host, and killing it ends every daemon and job. The kernel then drops the interfaces and
# mounts.
#
#   cluster.sh start            start, and wait until every node is idle
#   cluster.sh exec CMD...      run CMD on the login node: sbatch, squeue, python ...
#   cluster.sh as USER CMD...   the same as another user: `guest`, whom only the cluster knows, or one of the host's
#   cluster.sh with CMD...      start, exec CMD, stop, whatever happens; the exit status is that of CMD
#   cluster.sh on nK CMD...     run CMD on the node nK
#   cluster.sh cut|heal nK      take the link of nK down | up again, and resume the node
#   cluster.sh kill|boot nK     power nK off (link down, kill -9 of its init) | on again
#   cluster.sh rate nK RATE     limit the link of nK, both ways, e.g. 200mbit; `none` lifts it
#   cluster.sh traffic          bytes that each node has received and sent
#   cluster.sh status           nodes and jobs
#   cluster.sh stop
#
# The verbs work on the host, and on the login node itself. Environment of `start` and `with`:
#   SITE         work folder, made anew (/tmp/slurm-site)
#   NODES, CPUS, MEM, GPUS      nodes (4); of each the cores (2; may exceed the real ones), MB (2000), fake GPUs (0)
#   DBD          1: accounting, so that sacct works; 0: without, which starts faster (1)
#   GRACE        seconds from the signal of a preemption to its kill (15)
#   PRIVATE_TMP  1: each node has a /tmp of its own, as real ones do (0); SITE and the work must then lie elsewhere
#   OPEN         folders (A:B) that other users must reach, e.g. of a Python below /root: in the cluster, a parent that
#                only its owner enters is an empty folder with these in it
#   NET          first three numbers of the addresses (10.77.0)
set -euo pipefail
umask 022
SELF=$(readlink -f "$0")
PATH=$PATH:/usr/sbin:/sbin
SETTINGS=(SITE NODES CPUS MEM GPUS DBD GRACE PRIVATE_TMP OPEN NET)
GUEST=guest GUEST_ID=20001
HERE=/run/slurm-site # exists on login and nodes only
DBD_PORT=6819 CTLD_PORT=6817 MARIA_PORT=13306

die() {
  echo "cluster.sh: $*" >&2
  exit 1
}
wait_for() { # SECONDS CMD...
  local end=$((SECONDS + $1))
  shift
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.05
  done
}
is_dead() {
  local state
  state=$(sed 's/.*) //; s/ .*//' "/proc/$1/stat" 2> /dev/null) || return 0
  [ -z "$state" ] || [ "$state" = Z ]
}
port_is_open() { (exec 3<> "/dev/tcp/$1/$2") 2> /dev/null; }
init_of() { tr -d ' \n' < "/proc/$1/task/$1/children"; } # pid 1 of the namespaces that `unshare` made, seen from here
has_init() { [ -n "$(init_of "$1")" ]; }                 # (the file's size is 0 all the same)
# ---------------------------------------------------------------------------------------------------- what daemons read

settings() {
  if [ -r $HERE ]; then SITE=$(cat $HERE); fi
  : "${SITE:=/tmp/slurm-site}"
  # shellcheck disable=SC1091
  if [ "$1" = running ] && [ -r "$SITE/etc/env" ]; then . "$SITE/etc/env"; fi
  : "${NODES:=4}" "${CPUS:=2}" "${MEM:=2000}" "${GPUS:=0}" "${DBD:=1}" "${GRACE:=15}" "${PRIVATE_TMP:=0}" "${OPEN:=}"
  : "${NET:=10.77.0}"
}

write_files() {
  local name i
  mkdir -p "$SITE"/{etc,state,spool,log,run/munge,db,home,nodetmp}
  for name in "${SETTINGS[@]}"; do printf '%s=%q\n' "$name" "${!name}"; done > "$SITE/etc/env"
  (umask 077 && head -c 128 /dev/urandom > "$SITE/etc/munge.key")
  {
    echo "127.0.0.1 localhost"
    echo "$NET.1 login"
    for i in $(seq "$NODES"); do echo "$NET.$((10 + i)) n$i"; done
  } > "$SITE/etc/hosts"
  cp /etc/passwd /etc/group "$SITE/etc"
  if ! getent passwd $GUEST > /dev/null; then
    echo "$GUEST:x:$GUEST_ID:$GUEST_ID::$SITE/home/$GUEST:/bin/bash" >> "$SITE/etc/passwd"
    echo "$GUEST:x:$GUEST_ID:" >> "$SITE/etc/group"
    install -d -o $GUEST_ID -g $GUEST_ID "$SITE/home/$GUEST"
  fi
  write_slurm_conf > "$SITE/etc/slurm.conf"
  # The pmix plugin makes a folder of one and the same name on every node: not in a /tmp that they share.
  echo "PMIxCliTmpDirBase=$SITE/nodetmp" > "$SITE/etc/mpi.conf"
  (umask 077 && write_slurmdbd_conf > "$SITE/etc/slurmdbd.conf")
}

write_slurm_conf() {
  local accounting=none gres="" g
  if [ "$DBD" = 1 ]; then accounting=slurmdbd; fi
  if [ "$GPUS" -gt 0 ]; then
    # slurmd takes only character devices for GPUs: these are /dev/null.
    for g in $(seq 0 $((GPUS - 1))); do mknod "$SITE/etc/gpu$g" c 1 3; done
    echo "NodeName=n[1-$NODES] Name=gpu File=$SITE/etc/gpu[0-$((GPUS - 1))]" > "$SITE/etc/gres.conf"
    echo "GresTypes=gpu"
    gres="Gres=gpu:$GPUS"
  fi
  cat << END
ClusterName=hpc
SlurmctldHost=login
# A new cluster must not give out the ids of the last one's jobs: some programs would take old results for theirs.
FirstJobId=$((EPOCHSECONDS / 10 % 60000000 + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits so many seconds before it may start again (default 120).
AuthInfo=cred_expire=5
StateSaveLocation=$SITE/state
SlurmdSpoolDir=$SITE/spool/%n
SlurmctldPidFile=$SITE/run/slurmctld.pid
SlurmdPidFile=$SITE/run/slurmd-%n.pid
SlurmctldLogFile=$SITE/log/slurmctld.log
SlurmdLogFile=$SITE/log/slurmd-%n.log
# Neither needs cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# More cores may be declared than there are.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
# Without it, a job of more nodes than there are is taken, and waits for ever.
EnforcePartLimits=ALL
KillWait=5
MinJobAge=600
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
BatchStartTimeout=5
# Shorter, it drains a node whose link was cut ("Kill task failed").
UnkillableStepTimeout=120
AccountingStorageType=accounting_storage/$accounting
AccountingStorageHost=login
NodeName=n[1-$NODES] CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $gres State=UNKNOWN
PartitionName=main Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=$GRACE State=UP
PartitionName=urgent Nodes=n[1-$NODES] MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF State=UP
END
}

write_slurmdbd_conf() {
  cat << END
AuthType=auth/munge
DbdHost=login
SlurmUser=root
LogFile=$SITE/log/slurmdbd.log
PidFile=$SITE/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$MARIA_PORT
StorageUser=root
StoragePass=unused
StorageLoc=slurm
END
}
# ------------------------------------------------------------------------------------------- pid 1 of the login node

site_init() {
  local t0=${EPOCHREALTIME/./} i
  took() { printf '%-16s %6d ms\n' "$1" $(((${EPOCHREALTIME/./} - t0) / 1000)); }
  hostname login
  private_folders
  ip link set lo up
  ip link add br0 type bridge
  ip addr add "$NET.1/24" dev br0
  ip link set br0 up
  munged --key-file="$SITE/etc/munge.key" --socket=/run/munge/munge.socket.2 --pid-file="$SITE/run/munged.pid" \
    --log-file="$SITE/log/munged.log" --seed-file="$SITE/run/munged.seed" --num-threads=4
  took munged
  if [ "$DBD" = 1 ]; then start_accounting; fi
  slurmctld -D > "$SITE/log/slurmctld.out" 2>&1 &
  wait_for 30 port_is_open login $CTLD_PORT || die "slurmctld did not start, see $SITE/log/slurmctld.log"
  took slurmctld
  for i in $(seq "$NODES"); do boot "n$i"; done
  wait_for 60 all_idle || die "nodes are not idle: $(sinfo -N -h -p main | tr '\n' ';')"
  took "all nodes idle"
  touch "$SITE/run/ready"
  reap
}

private_folders() { # in a mount namespace of our own
  local pmix=/usr/lib/x86_64-linux-gnu/pmix2/lib name
  mount --make-rprivate /
  mount -t tmpfs -o mode=755 tmpfs /run
  echo "$SITE" > $HERE
  if [ -n "$OPEN" ]; then open_folders; fi
  mkdir -p /run/munge /etc/slurm
  mount --bind "$SITE/run/munge" /run/munge
  mount --bind "$SITE/etc" /etc/slurm
  for name in hosts passwd group; do mount --bind "$SITE/etc/$name" "/etc/$name"; done
  # Debian's plugin opens libpmix.so, a link that only libpmix-dev has.
  if [ -e $pmix/libpmix.so.2 ] && [ ! -e $pmix/libpmix.so ]; then
    cp -r --preserve=mode,links $pmix "$SITE/pmix"
    ln -s libpmix.so.2 "$SITE/pmix/libpmix.so"
    mount --bind "$SITE/pmix" $pmix
  fi
}

open_folders() {
  local folders folder closed i
  mapfile -t folders < <(tr : '\n' <<< "$OPEN:$SITE:$(dirname "$SELF")" | xargs -d '\n' readlink -e | sort -u)
  mapfile -t closed < <(for folder in "${folders[@]}"; do closed_parent "$folder"; done | sort -u)
  for i in "${!folders[@]}"; do
    mkdir -p "/run/open/$i"
    mount --rbind "${folders[i]}" "/run/open/$i"
  done
  for folder in "${closed[@]}"; do mount -t tmpfs -o mode=755 tmpfs "$folder"; done
  for i in "${!folders[@]}"; do
    if [ -e "${folders[i]}" ]; then continue; fi # no parent was closed
    mkdir -p "${folders[i]}"
    mount --rbind "/run/open/$i" "${folders[i]}"
  done
}

closed_parent() { # the uppermost that others may not enter; nothing where there is none
  local folder=$1 found=""
  while folder=$(dirname "$folder") && [ "$folder" != / ]; do
    if [ $((0$(stat -c %a "$folder") & 1)) = 0 ]; then found=$folder; fi
  done
  if [ -n "$found" ]; then echo "$found"; fi
}

start_accounting() { # a database in memory
  local options=(--no-defaults --user=root --datadir="$SITE/db" --skip-name-resolve --skip-grant-tables
    --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0
    --innodb-lock-wait-timeout=900)
  mount -t tmpfs tmpfs "$SITE/db"
  # mariadb-install-db wants programs that mariadb-server-core lacks. --bootstrap takes one statement a line.
  {
    echo "create database if not exists mysql;"
    echo "use mysql;"
    cat /usr/share/mysql/mysql_system_tables.sql
    echo "create database slurm;"
  } | mariadbd "${options[@]}" --bootstrap > "$SITE/log/mariadb-boot.log" 2>&1
  mariadbd "${options[@]}" --socket="$SITE/db/sock" --port=$MARIA_PORT --bind-address=127.0.0.1 \
    --pid-file="$SITE/run/mariadb.pid" --performance-schema=OFF > "$SITE/log/mariadb.log" 2>&1 &
  wait_for 30 port_is_open 127.0.0.1 $MARIA_PORT || die "mariadbd did not start, see $SITE/log/mariadb.log"
  took mariadb
  slurmdbd -D > "$SITE/log/slurmdbd.out" 2>&1 &
  wait_for 30 port_is_open login $DBD_PORT || die "slurmdbd did not start, see $SITE/log/slurmdbd.out"
  sacctmgr -i add cluster hpc > /dev/null 2>&1 || true # slurmctld may have done it
  took slurmdbd
}

all_idle() { [ "$(sinfo -h -N -p main -t idle -o %N | wc -l)" = "$NODES" ]; }
reap() { while :; do wait -n 2> /dev/null || sleep 0.5; done; } # orphans, until it is killed
# ------------------------------------------------------------------------------------------------------------- nodes

boot() { # on login
  local node=$1 parent init
  mkdir -p "$SITE/spool/$node"
  rm -f "$SITE/run/$node.init"
  apart __node "$node" > "$SITE/log/$node.out" 2>&1 < /dev/null &
  parent=$!
  wait_for 5 has_init $parent || die "$node did not start"
  init=$(init_of $parent)
  ip link del "v$node" 2> /dev/null || true
  ip link add "v$node" type veth peer name eth0 netns "$init"
  ip link set "v$node" master br0 up
  echo "$init" > "$SITE/run/$node.init"
}

apart() { exec setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$SELF" "$@"; }

node_init() { # pid 1 of a node
  local node=$1
  hostname "$node"
  mount --make-rprivate /
  mount -t tmpfs tmpfs /dev/shm
  mount -t tmpfs tmpfs "$SITE/nodetmp"
  if [ "$PRIVATE_TMP" = 1 ]; then mount -t tmpfs tmpfs /tmp; fi
  ip link set lo up
  wait_for 5 ip link show eth0 || die "$node: no eth0"
  ip addr add "$NET.$((10 + ${node#n}))/24" dev eth0
  ip link set eth0 up
  slurmd -D > /dev/null 2>&1 &
  reap # longer than slurmd, so that slurmd alone can be killed, too
}

node_pid() {
  [ -s "$SITE/run/$1.init" ] || die "no node $1"
  cat "$SITE/run/$1.init"
}
# ------------------------------------------------------------------------------------------------------------- verbs

on_login() {
  local parent
  if [ -e $HERE ] && [ "$(hostname)" = login ]; then
    clean "$@"
    return
  fi
  parent=$(site_pid)
  if is_dead "$parent"; then die "the cluster is dead"; fi
  clean nsenter -t "$(init_of "$parent")" -n -u -m -p -- env -C "$PWD" "$@"
}
on_node() { # nK CMD...
  local pid
  pid=$(node_pid "$1")
  shift
  on_login nsenter -t "$pid" -n -u -m -p -- env -C "$PWD" "$@"
}
as_user() { # USER CMD...
  local user=$1 home
  shift
  home=$(on_login getent passwd "$user" | cut -d: -f6) || true
  [ -n "$home" ] || die "no user $user"
  on_login setpriv --reuid="$user" --regid="$user" --init-groups env HOME="$home" USER="$user" LOGNAME="$user" "$@"
}

clean() { # srun and sbatch hand the caller's environment to the job
  local name drop=()
  for name in "${SETTINGS[@]}"; do drop+=(-u "$name"); done
  env "${drop[@]}" "$@"
}

site_pid() {
  [ -s "$SITE/run/site.pid" ] || die "not started ($SITE/run/site.pid)"
  cat "$SITE/run/site.pid"
}

start() {
  local began=${EPOCHREALTIME/./} pid
  may_start
  rm -rf "$SITE"
  write_files
  export "${SETTINGS[@]}"
  apart __site > "$SITE/log/site.out" 2>&1 < /dev/null &
  pid=$!
  echo $pid > "$SITE/run/site.pid"
  until [ -e "$SITE/run/ready" ]; do
    if is_dead $pid; then
      cat "$SITE/log/site.out" >&2
      rm -f "$SITE/run/site.pid"
      die "it did not start, logs in $SITE/log"
    fi
    sleep 0.05
  done
  cat "$SITE/log/site.out" >&2
  echo "$NODES nodes up in $(((${EPOCHREALTIME/./} - began) / 1000)) ms, pid $pid, $SITE" >&2
}

may_start() {
  local missing="" name need=(munged slurmctld slurmd sbatch ip tc unshare nsenter setpriv)
  if [ "$DBD" = 1 ]; then need+=(slurmdbd mariadbd); fi
  for name in "${need[@]}"; do command -v "$name" > /dev/null || missing+=" $name"; done
  [ -z "$missing" ] || die "not installed:$missing (slurm/cluster/README.md has the packages)"
  [ "$(id -u)" = 0 ] || die "it needs root: namespaces of its own, and slurmctld runs jobs for others"
  if [[ $SITE = *[!A-Za-z0-9/._-]* ]]; then die "SITE $SITE: slurm.conf takes letters, digits and / . _ - only"; fi
  if [ -e "$SITE" ] && [ ! -e "$SITE/etc/slurm.conf" ] && [ -n "$(ls -A "$SITE")" ]; then
    die "$SITE is another thing's folder: it would be removed"
  fi
  if [ -s "$SITE/run/site.pid" ] && ! is_dead "$(cat "$SITE/run/site.pid")"; then die "it runs already, in $SITE"; fi
  if [ "$PRIVATE_TMP" = 1 ] && [[ $SITE/ = /tmp/* || $PWD/ = /tmp/* ]]; then
    die "PRIVATE_TMP=1 needs SITE and the work outside /tmp"
  fi
}

stop() {
  local parent init pid
  parent=$(site_pid)
  init=$(init_of "$parent" 2> /dev/null || true)
  if ! is_dead "$parent" && grep -q __site "/proc/$parent/cmdline" 2> /dev/null; then
    kill -9 "$parent" # --kill-child then kills pid 1 of the namespace, and the kernel all the rest
    for pid in $parent $init; do wait_for 10 is_dead "$pid" || die "$pid does not die"; done
  fi
  rm -f "$SITE/run/site.pid" "$SITE/run/ready"
}

rate() { # nK RATE: a bucket at either end of its link
  local node=$1 rate=$2 bucket
  on_login tc qdisc del dev "v$node" root 2> /dev/null || true
  on_login nsenter -t "$(node_pid "$node")" -n tc qdisc del dev eth0 root 2> /dev/null || true
  if [ "$rate" = none ]; then return; fi
  bucket=(root tbf rate "$rate" burst 256kb latency 100ms)
  on_login tc qdisc add dev "v$node" "${bucket[@]}"
  on_login nsenter -t "$(node_pid "$node")" -n tc qdisc add dev eth0 "${bucket[@]}"
}

traffic() { # what the bridge's end of a link has sent, the node has received
  local i
  for i in $(seq "$NODES"); do
    on_login ip -s -j link show "vn$i" |
      sed -E "s/.*\"rx\":\{\"bytes\":([0-9]+).*\"tx\":\{\"bytes\":([0-9]+).*/n$i received \2 sent \1/"
  done
}

verb=${1:-status}
if [ $# -gt 0 ]; then shift; fi
case $verb in
  start | with) settings new ;;
  *) settings running ;;
esac
case $verb in
  on | cut | heal | kill | rate)
    site_pid > /dev/null
    node_pid "${1:-}" > /dev/null
    ;;
esac
case $verb in
  start) start ;;
  stop) stop ;;
  exec) on_login "$@" ;;
  as) as_user "$@" ;;
  on) on_node "$@" ;;
  with)
    start
    trap stop EXIT
    trap 'exit 130' INT TERM
    status=0
    on_login "$@" || status=$?
    exit $status
    ;;
  cut) on_login ip link set "v$1" down ;;
  heal)
    on_login ip link set "v$1" up
    on_login scontrol update nodename="$1" state=resume 2> /dev/null || true # it may not have been down
    ;;
  kill)
    on_login ip link set "v$1" down
    on_login kill -9 "$(node_pid "$1")"
    ;;
  boot) on_login "$SELF" __boot "$1" ;;
  rate) rate "$@" ;;
  traffic) traffic ;;
  status) on_login bash -c 'sinfo -N -l -p main; squeue' ;;
  __site) site_init ;;
  __node) node_init "$@" ;;
  __boot) boot "$1" ;;
  *) die "no verb $verb: start exec as with on cut heal kill boot rate traffic status stop" ;;
esac
