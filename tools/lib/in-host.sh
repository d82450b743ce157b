#!/bin/bash
# Run a command in a "host" of its own: network, mount and UTS namespaces.
#
#     tools/lib/in-host.sh COMMAND [ARGUMENT…]
#
# For tests of the runtime, which makes links, mounts and cgroups: nothing of
# it is seen outside, and the mounts go when the command ends. Where the
# controllers are bound to cgroup v1 (with an empty v2 hierarchy beside them,
# which OCI runtimes refuse), the command sees pure cgroup2 at /sys/fs/cgroup
# and the v1 hierarchies under /run/cgroup1, where the runtime finds them
# through mountinfo. Nothing of the outer host's mounts is changed.
set -euo pipefail

if [ "${PYCONTAINER_IN_HOST:-}" != 1 ]; then
    exec env PYCONTAINER_IN_HOST=1 \
        unshare --net --uts --mount --propagation private -- "$0" "$@"
fi

hostname pyc-test
ip link set lo up
controllers=()
while read -r _ point type options _; do
    if [ "$type" = cgroup ]; then
        for option in ${options//,/ }; do
            case "$option" in
            memory|cpu|cpuacct|pids|blkio|freezer|cpuset)
                controllers+=("$option:$point") ;;
            esac
        done
    fi
done < /proc/self/mounts

# Mount points under /run must be this namespace's own: /run itself may not be
# a mount of its own, and CRIU keeps its cache there only on a tmpfs.
resolv=$(cat /etc/resolv.conf 2>/dev/null || true)
mount -t tmpfs -o mode=755 pyc-run /run
if [ -L /etc/resolv.conf ] && [ -n "$resolv" ]; then
    target=$(readlink -m /etc/resolv.conf)
    mkdir -p "$(dirname "$target")" && printf '%s\n' "$resolv" > "$target"
fi
for item in "${controllers[@]}"; do
    mkdir -p "/run/cgroup1/${item%%:*}"
    mount --bind "${item#*:}" "/run/cgroup1/${item%%:*}"
done
# A sysfs of its own shows the network devices of this network namespace.
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mkdir -p /sys/fs/cgroup
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
exec "$@"
