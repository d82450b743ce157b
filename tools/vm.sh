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

# A virtual machine with what users run, whatever kernel and cgroups this
# machine has: Debian 13 with its own kernel, systemd as PID 1, cgroup v2
# alone, AppArmor, and a root file system with project quotas.
#
#   tools/vm.sh make                   make it, if it is not there
#   tools/vm.sh up                     make it if need be, and boot it
#   tools/vm.sh run COMMAND [ARG...]   in a copy of this clone, as root, with
#                                      what the tests need in PATH
#   tools/vm.sh test TEST...           run tests of the runtime in it
#   tools/vm.sh iscsi                  run the tests of volumes over iSCSI
#   tools/vm.sh down [--purge]         power it off; remove it
#
# Its packages and Python environment are installed from outside, at this
# machine's own speed. It needs neither bridges nor privileges beyond root's:
# QEMU's user network and one port of the loopback address.
#
#   NOVA_PYCONTAINER_VM_ACCEL   QEMU's accelerator: kvm, tcg (default: kvm
#                               where /dev/kvm is; tcg emulates, ten times
#                               slower)
#   NOVA_PYCONTAINER_VM_MEMORY  MiB, default 6144
#   NOVA_PYCONTAINER_VM_PORT    of ssh on 127.0.0.1, default 2222
#   NOVA_PYCONTAINER_VM_BIND    a directory that the installation needs to
#                               see, such as a site's own Python packages

# shellcheck source=tools/lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=tools/images/mirror.sh
. "$REPO/tools/images/mirror.sh"
need_root

VM=$WORK/vm
SUITE=trixie
PORT=${NOVA_PYCONTAINER_VM_PORT:-2222}
MEMORY=${NOVA_PYCONTAINER_VM_MEMORY:-6144}
ACCEL=${NOVA_PYCONTAINER_VM_ACCEL:-$([ -e /dev/kvm ] && echo kvm || echo tcg)}
BIND=${NOVA_PYCONTAINER_VM_BIND:-}
BOOT_TIMEOUT=600

in_vm() {
    ssh -i "$VM/key" -p "$PORT" -o StrictHostKeyChecking=no \
        -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
        -o ConnectTimeout=10 root@127.0.0.1 "$@"
}

running() {
    [ -e "$VM/pid" ] && [ "$(cat "/proc/$(cat "$VM/pid")/comm" \
        2>/dev/null)" = qemu-system-x86 ]
}

# inside_root COMMAND...: in the root that becomes the machine's disk, with a
# mount namespace of its own, so that nothing is left mounted.
inside_root() {
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -euc '
        root=$1 bind=$2; shift 2
        mount --bind "$root" "$root"
        for name in proc sys dev; do
            mount --rbind "/$name" "$root/$name"
        done
        mount -t tmpfs tmpfs "$root/run"
        mount -t tmpfs tmpfs "$root/tmp"
        cp /etc/resolv.conf "$root/run/resolv.conf"
        if [ -n "$bind" ]; then
            mkdir -p "$root$bind"
            mount --bind "$bind" "$root$bind"
        fi
        cd "$root"
        mkdir -p mnt/old
        pivot_root . mnt/old
        cd /
        umount -l /mnt/old
        exec env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
            SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
            TERM=dumb "$@"' - "$VM/root" "$BIND" "$@"
}

# How this machine reaches mirrors and indexes holds for that one too.
copy_configuration() {
    local path
    apt_acquire_options >"$VM/root/etc/apt/apt.conf.d/80site"
    for path in /etc/ssl/certs /usr/local/share/ca-certificates \
            /etc/pip.conf /root/.config/pip /root/.config/uv; do
        if [ -e "$path" ]; then
            mkdir -p "$VM/root$(dirname "$path")"
            cp -rT "$path" "$VM/root$path"
        fi
    done
}

make_root() {
    local root=$VM/root
    say "vm: unpacking Debian $SUITE"
    rm -rf --one-file-system "$root"
    logged vm-root debian_bootstrap "$VM/sources.list" "$root" "$SUITE" \
        --variant=important \
        --include=apparmor,ca-certificates,dbus,git,linux-image-amd64 \
        --include=openssh-server,python3,quota,sudo,systemd-sysv \
        --include=cryptsetup-bin,dmsetup,open-iscsi,tgt
    copy_configuration
    echo host >"$root/etc/hostname"
    printf '127.0.0.1 localhost host\n::1 localhost\n' >"$root/etc/hosts"
    # The resolver of QEMU's user network.
    echo nameserver 10.0.2.3 >"$root/etc/resolv.conf"
    printf '[Match]\nDriver=virtio_net\nName=en*\n[Network]\nDHCP=yes\n' \
        >"$root/etc/systemd/network/80-vm.network"
    echo '/dev/vda / ext4 prjquota 0 1' >"$root/etc/fstab"
    # Without it the root is mounted before quotas are known.
    echo quota_v2 >>"$root/etc/initramfs-tools/modules"
    rm -f "$VM/key" "$VM/key.pub"
    ssh-keygen -q -t ed25519 -N '' -f "$VM/key"
    install -D -m 600 "$VM/key.pub" "$root/root/.ssh/authorized_keys"
}

make_disk() {
    local root=$VM/root size=30G
    say 'vm: installing what the tests need'
    git clone -q "$REPO" "$root/root/clone"
    mkdir -p "$root$WORK"
    # Unpacked and built once is enough.
    cp -a "$PREFIX" "$WORK/images" "$root$WORK/" 2>/dev/null || true
    mv "$root/etc/resolv.conf" "$VM/resolv.conf"
    ln -s /run/resolv.conf "$root/etc/resolv.conf"
    logged vm-setup inside_root env NOVA_PYCONTAINER_WORK="$WORK" \
        /root/clone/tools/lib/setup.sh
    logged vm-initramfs inside_root update-initramfs -u
    logged vm-services inside_root bash -c '
        systemctl enable systemd-networkd ssh
        systemctl disable mariadb rabbitmq-server memcached \
            openvswitch-switch ovn-central ovn-host 2>/dev/null || true'
    rm "$root/etc/resolv.conf"
    mv "$VM/resolv.conf" "$root/etc/resolv.conf"
    cp "$root"/boot/vmlinuz-* "$VM/vmlinuz"
    cp "$root"/boot/initrd.img-* "$VM/initrd"
    truncate -s "$size" "$VM/disk.new"
    logged vm-disk mke2fs -q -t ext4 -O quota,project -d "$root" "$VM/disk.new"
    rm -rf --one-file-system "$root"
    mv "$VM/disk.new" "$VM/disk"
}

make() {
    local package
    mkdir -p -m 700 "$VM"
    [ ! -e "$VM/disk" ] || return 0
    for package in mmdebstrap openssh-client qemu-system-x86; do
        dpkg-query -W "$package" >/dev/null 2>&1 ||
            logged "apt-$package" env DEBIAN_FRONTEND=noninteractive \
                apt-get -q -y --no-install-recommends install "$package"
    done
    make_root
    make_disk
}

up() {
    local deadline
    if running; then
        say 'vm: it is up'
        return
    fi
    make
    say "vm: booting ($ACCEL)"
    qemu-system-x86_64 -daemonize -pidfile "$VM/pid" -display none \
        -serial "file:$VM/console.log" -no-reboot \
        -accel "$ACCEL" -cpu max -smp 2 -m "$MEMORY" \
        -kernel "$VM/vmlinuz" -initrd "$VM/initrd" \
        -append 'root=/dev/vda rw console=ttyS0 quiet' \
        -drive "file=$VM/disk,format=raw,if=virtio,cache=unsafe" \
        -netdev "user,id=net,hostfwd=tcp:127.0.0.1:$PORT-:22" \
        -device virtio-net-pci,netdev=net
    deadline=$((SECONDS + BOOT_TIMEOUT))
    until in_vm systemctl is-system-running --wait >/dev/null 2>&1; do
        running || die "vm: QEMU ended; see $VM/console.log, and try" \
            "NOVA_PYCONTAINER_VM_ACCEL=tcg"
        [ $SECONDS -lt $deadline ] || die "vm: it does not boot;" \
            "see $VM/console.log"
        sleep 2
    done
    say "vm: $(in_vm uname -rv)"
}

run() {
    running || die 'vm: it is not up'
    (cd "$REPO" && git ls-files -z | tar --null -T - -cf -) |
        in_vm 'cd /root/clone && tar xf -'
    in_vm "cd /root/clone && export LC_ALL=C.UTF-8 PYTHONPATH=/root/clone \
        OS_NOVA_DISABLE_EVENTLET_PATCHING=true \
        NOVA_PYCONTAINER_WORK=$WORK \
        NOVA_PYCONTAINER_PATIENCE=${NOVA_PYCONTAINER_PATIENCE:-400} \
        PATH=$VENV/bin:$PREFIX/bin:\$PATH && $(printf '%q ' "$@")"
}

down() {
    local pid
    if running; then
        pid=$(cat "$VM/pid")
        in_vm poweroff 2>/dev/null || true
        timeout 90 tail --pid="$pid" -f /dev/null || kill "$pid"
    fi
    rm -f "$VM/pid"
    if [ "${1:-}" = --purge ]; then
        rm -rf --one-file-system "$VM"
    fi
}

case ${1:-} in
make) make ;;
up) up ;;
run) shift; run "$@" ;;
test) shift; run tools/lib/in-host.sh python -m testtools.run "$@" ;;
iscsi)
    # The initiator is of the first network namespace alone.
    run python -m testtools.run tests.functional.test_iscsi ;;
down) down "${2:-}" ;;
*) sed -n '14,38p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
   [ "${1:-}" = --help ] || exit 2 ;;
esac
