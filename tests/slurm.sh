#!/usr/bin/env bash
# A Slurm of one node, this machine, with everything it has in one folder: beside a real one it disturbs nothing. Or of
# several that are network namespaces of this machine, and reach each other by their names.
#
#   tests/slurm.sh start DIR [CPUS [NODE...]]   then: export SLURM_CONF=DIR/slurm.conf; sinfo
#   tests/slurm.sh join DIR                     in each further namespace NODE
#   tests/slurm.sh stop DIR
#
# Needs Debian's slurm-wlm and munge, and no root. It keeps no accounts, so sacct finds nothing.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
what=$1 dir=$(realpath -m "$2") cpus=${3:-4}
export SLURM_CONF="$dir/slurm.conf"

port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }

stop() {
  timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
  for file in "$dir"/{slurmd.*,slurmctld,munged}.pid; do
    [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
  done
}

join() { # this host's node
  slurmd -N "$node"
  for _ in $(seq 100); do
    [ "$(sinfo -h -n "$node" -p debug -o %T 2>/dev/null)" = idle ] && return
    sleep 0.1
  done
  echo "node $node did not come up; see $dir/*.log" >&2
  stop
  exit 1
}

node=$(hostname -s)

if [ "$what" = stop ]; then
  stop
  exit
fi

if [ "$what" = join ]; then
  join
  exit
fi

mkdir -p "$dir/ctld"
chmod 0755 "$dir"
me=$(id -un) nodes="NodeName=$node NodeAddr=127.0.0.1" address=127.0.0.1
if [ $# -gt 3 ]; then
  nodes="NodeName=$node,$(IFS=, && echo "${*:4}")" address=$node
fi
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node($address)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5 # a job that is requeued waits until its old credential has expired
SlurmctldPort=$(port)
SlurmdPort=$(port)
StateSaveLocation=$dir/ctld
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
$nodes CPUs=$cpus RealMemory=1000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=warned Nodes=ALL GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" --num-threads=1
slurmctld
join
