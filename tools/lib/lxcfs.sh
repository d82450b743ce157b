#!/bin/bash
# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

# Runs lxcfs in the foreground for a host that is a set of namespaces, with its
# mount at DIRECTORY, which the host's processes see:
#
#   tools/lib/lxcfs.sh DIRECTORY
#
# The hierarchies of cgroup v1 are where such a host has them
# (/run/cgroup1/<controller>), and only for lxcfs where it looks for them.

set -eu
directory=$1
# One that was killed has left its mount, through which nothing is reached.
mkdir -p "$directory" 2>/dev/null || umount --lazy "$directory"
if ! mountpoint -q "$directory"; then
    mount --bind "$directory" "$directory"
    mount --make-shared "$directory"
fi
# shellcheck disable=SC2016
exec unshare --mount --propagation unchanged bash -eu -c '
if [ -d /run/cgroup1 ]; then
    mount -t tmpfs cgroups /sys/fs/cgroup
    for point in /run/cgroup1/*; do
        mkdir "/sys/fs/cgroup/${point##*/}"
        mount --bind "$point" "/sys/fs/cgroup/${point##*/}"
    done
    mkdir /sys/fs/cgroup/unified
    mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
fi
# Each guest gets its own load, and as many CPUs as its quota is of.
exec lxcfs -f -l --enable-cfs -p /run/lxcfs.pid "$1"
' bash "$directory"
