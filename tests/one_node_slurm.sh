#!/usr/bin/env bash
# A Slurm of one node, this machine, with everything it has in one folder: beside a real one it disturbs nothing.
#
#   tests/one_node_slurm.sh start DIR [CPUS]    then: export SLURM_CONF=DIR/slurm.conf; sinfo
#   tests/one_node_slurm.sh stop DIR
#
# Needs Debian's slurm-wlm and munge, and no root. It keeps no accounts, so sacct finds nothing.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
what=$1 dir=$(realpath -m "$2") cpus=${3:-4}
export SLURM_CONF="$dir/slurm.conf"

port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }

stop() {
  timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
  for name in slurmd slurmctld munged; do
    [ -s "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
  done
}

if [ "$what" = stop ]; then
  stop
  exit
fi

mkdir -p "$dir/ctld" "$dir/d"
chmod 0755 "$dir"
node=$(hostname -s) me=$(id -un)
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5 # a job that is requeued waits until its old credential has expired
SlurmctldPort=$(port)
SlurmdPort=$(port)
StateSaveLocation=$dir/ctld
SlurmdSpoolDir=$dir/d
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
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
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=1000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=$node Default=YES MaxTime=INFINITE State=UP
PartitionName=warned Nodes=$node GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=$node PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" --num-threads=1
slurmctld
slurmd
for _ in $(seq 100); do
  [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && exit
  sleep 0.1
done
echo "the node did not come up; see $dir/*.log" >&2
stop
exit 1
