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

# The new /run is made beside the old one: the hierarchies may lie in there.
# A /run of our own also is the tmpfs on which alone CRIU keeps its cache.
resolv=$(cat /etc/resolv.conf 2>/dev/null || true)
run=$(mktemp -d)
mount -t tmpfs -o mode=755 pyc-run "$run"
while read -r _ point type options _; do
    # A mount that another one covers is listed as well.
    if [ "$type" != cgroup ] || [ ! -e "$point/cgroup.procs" ]; then
        continue
    fi
    for option in ${options//,/ }; do
        case "$option" in
        memory|cpu|cpuacct|pids|blkio|freezer|cpuset)
            mkdir -p "$run/cgroup1/$option"
            mountpoint -q "$run/cgroup1/$option" ||
                mount --bind "$point" "$run/cgroup1/$option" ;;
        esac
    done
done < /proc/self/mounts
mount --no-mtab --move "$run" /run
rmdir "$run"
if [ -L /etc/resolv.conf ] && [ -n "$resolv" ]; then
    target=$(readlink -m /etc/resolv.conf)
    mkdir -p "$(dirname "$target")" && printf '%s\n' "$resolv" > "$target"
fi
# A sysfs of its own shows the network devices of this network namespace.
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mkdir -p /sys/fs/cgroup
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
unset PYCONTAINER_IN_HOST
exec "$@"
