#!/bin/bash
# A Slurm cluster of one node, in namespaces of its own: nothing of it is seen from outside, and `ray stop`, with which
# `ray symmetric-run` ends, sees no other Ray. Then the given script, in FOLDER/work.
#   unshare --mount --net --pid --fork --kill-child --mount-proc bash single_node_slurm.sh FOLDER SCRIPT [argument...]
set -euo pipefail
folder=$1
shift
ip link set lo up
ip link add node0 type veth peer name node1
ip addr add 10.99.0.1/24 dev node0
ip link set node0 up
ip link set node1 up
mkdir -p "$folder"/{state,spool,munge,work} /tmp/ray /run/munge
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs /run/munge
chmod 711 /run/munge

node=$(hostname)
mknod "$folder/gpu0" c 1 3 # two devices that stand for GPUs, so that the script's own request is granted
mknod "$folder/gpu1" c 1 3
echo "Name=gpu File=$folder/gpu[0-1]" > "$folder/gres.conf"
cat > "$folder/slurm.conf" <<CONFIG
ClusterName=test
SlurmctldHost=$node(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
GresTypes=gpu
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$node NodeAddr=10.99.0.1 CPUs=$(nproc --all) Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONFIG
export SLURM_CONF=$folder/slurm.conf
head -c 128 /dev/urandom > "$folder/munge/key"
chmod 700 "$folder/munge"
chmod 400 "$folder/munge/key"
munged --force --key-file="$folder/munge/key" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" \
    --pid-file="$folder/munge/pid"
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
until sinfo --noheader --format=%T | grep -q idle; do sleep 0.5; done

cd "$folder/work"
bash -euo pipefail "$@"
