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

"""The OCI configuration of a container.

https://github.com/opencontainers/runtime-spec: ``config.json`` of a system
container with all namespaces of its own.
"""

import collections.abc as cabc
import os
import pathlib
import resource
import types
import typing as ty

from nova_pycontainer.runtime import fuse
from nova_pycontainer.runtime import idmap
from nova_pycontainer.runtime import init as initd
from nova_pycontainer.runtime import seccomp
from nova_pycontainer.runtime import syscalls

#: Capabilities within the container's user namespace. Missing are those that
#: have no meaning there (SYS_MODULE, SYS_RAWIO, SYS_TIME, SYS_BOOT has one:
#: reboot(2) in a PID namespace tells the agent), and those that only open
#: kernel surface (BPF, PERFMON, SYSLOG, MAC_*).
CAPABILITIES = {
    'CAP_CHOWN': 0, 'CAP_DAC_OVERRIDE': 1, 'CAP_DAC_READ_SEARCH': 2,
    'CAP_FOWNER': 3, 'CAP_FSETID': 4, 'CAP_KILL': 5, 'CAP_SETGID': 6,
    'CAP_SETUID': 7, 'CAP_SETPCAP': 8, 'CAP_LINUX_IMMUTABLE': 9,
    'CAP_NET_BIND_SERVICE': 10, 'CAP_NET_BROADCAST': 11, 'CAP_NET_ADMIN': 12,
    'CAP_NET_RAW': 13, 'CAP_IPC_LOCK': 14, 'CAP_IPC_OWNER': 15,
    'CAP_SYS_CHROOT': 18, 'CAP_SYS_PTRACE': 19, 'CAP_SYS_PACCT': 20,
    'CAP_SYS_ADMIN': 21, 'CAP_SYS_BOOT': 22, 'CAP_SYS_NICE': 23,
    'CAP_SYS_RESOURCE': 24, 'CAP_SYS_TTY_CONFIG': 26, 'CAP_MKNOD': 27,
    'CAP_LEASE': 28, 'CAP_AUDIT_WRITE': 29, 'CAP_AUDIT_CONTROL': 30,
    'CAP_SETFCAP': 31, 'CAP_AUDIT_READ': 37,
}

_NOFILE = 1048576

#: What no container may see of its host.
_MASKED = (
    '/proc/acpi', '/proc/asound', '/proc/interrupts', '/proc/kcore',
    '/proc/keys', '/proc/latency_stats', '/proc/sched_debug', '/proc/scsi',
    '/proc/timer_list', '/sys/firmware', '/sys/devices/virtual/powercap',
    # sysfs has no namespaces for block devices: lsblk(8) would list those of
    # the host and of all containers.
    '/sys/block', '/sys/class/block', '/sys/dev/block',
)
_READ_ONLY = (
    '/proc/bus', '/proc/fs', '/proc/irq', '/proc/sysrq-trigger',
)

CONFIG_DRIVE = '/config-drive'
#: Where a container that is being rescued has its own root.
RESCUED: ty.Final = '/mnt'


def capabilities() -> list[str]:
    """Those of the container that this host's root may give away.

    A runtime fails on a capability outside its own bounding set.
    """
    return [name for name, number in CAPABILITIES.items()
            if syscalls.in_bounding_set(number)]


def rlimits() -> list[dict[str, ty.Any]]:
    """The limit on descriptors: as high as ours, and as usual.

    Without CAP_SYS_RESOURCE a hard limit cannot be raised.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if (syscalls.in_bounding_set(syscalls.CAP_SYS_RESOURCE) or
            hard == resource.RLIM_INFINITY):
        hard = _NOFILE
    hard = min(hard, _NOFILE)
    return [{'type': 'RLIMIT_NOFILE', 'hard': hard, 'soft': min(1024, hard)}]


def _mounts(
    config_drive: pathlib.Path | None, rescued: pathlib.Path | None,
    nodes: cabc.Iterable[pathlib.Path],
    shares: cabc.Mapping[str, pathlib.Path],
) -> list[dict[str, ty.Any]]:
    def fs(destination: str, fstype: str, *options: str,
           source: str | None = None) -> dict[str, ty.Any]:
        return {'destination': destination, 'type': fstype,
                'source': source or fstype, 'options': list(options)}

    mounts = [
        fs('/proc', 'proc', 'nosuid', 'noexec', 'nodev'),
        fs('/dev', 'tmpfs', 'nosuid', 'strictatime', 'mode=755',
           'size=65536k'),
        fs('/dev/pts', 'devpts', 'nosuid', 'noexec', 'newinstance',
           'ptmxmode=0666', 'mode=0620', 'gid=5'),
        fs('/dev/shm', 'tmpfs', 'nosuid', 'nodev',  # noqa: S108
           'mode=1777'),
        fs('/dev/mqueue', 'mqueue', 'nosuid', 'noexec', 'nodev'),
        # Read-only, as systemd's container interface asks: udev then stays
        # off, and systemd-networkd does not wait for it.
        fs('/sys', 'sysfs', 'nosuid', 'noexec', 'nodev', 'ro'),
        fs('/sys/fs/cgroup', 'cgroup', 'nosuid', 'noexec', 'nodev', 'rw',
           'relatime'),
        fs('/run', 'tmpfs', 'nosuid', 'nodev', 'strictatime', 'mode=755'),
    ]
    if config_drive is not None:
        mounts.append({
            'destination': CONFIG_DRIVE, 'type': 'bind',
            'source': str(config_drive),
            'options': ['bind', 'ro', 'nosuid', 'nodev', 'noexec']})
    if rescued is not None:
        # Not nosuid: whoever repairs it may want to change his root to it.
        mounts.append({
            'destination': RESCUED, 'type': 'bind', 'source': str(rescued),
            'options': ['bind', 'rw', 'nodev']})
    mounts += [{
        'destination': f'/dev/{node.name}', 'type': 'bind',
        'source': str(node), 'options': ['bind', 'rw', 'nosuid', 'noexec']}
        for node in nodes]
    mounts += [{
        'destination': f'/{name}', 'type': 'bind', 'source': str(path),
        'options': ['bind', 'ro', 'nosuid', 'nodev', 'noexec']}
        for name, path in shares.items()]
    return mounts


def _user(joined: str | None) -> list[dict[str, str]]:
    if joined is None:
        return [{'type': 'user'}]
    return [{'type': 'user', 'path': f'{joined}/user'},
            {'type': 'time', 'path': f'{joined}/time_for_children'}]


def make(
    *,
    uuid: str,
    hostname: str,
    root: pathlib.Path,
    base_id: int,
    init: initd.Init,
    cgroups_path: str,
    resources: dict[str, ty.Any],
    config_drive: pathlib.Path | None = None,
    nesting: bool = False,
    rescued: pathlib.Path | None = None,
    nodes: cabc.Iterable[pathlib.Path] = (),
    joined: str | None = None,
    shares: cabc.Mapping[str, pathlib.Path] = types.MappingProxyType({}),
) -> dict[str, ty.Any]:
    """Return the content of ``config.json``.

    :param rescued: another root directory of the container
    :param nodes: devices that it has, of :class:`.volume.Nodes`
    :param joined: directory of its user and its time namespace, if they are
        made already, see :func:`.namespaces.user_and_time`
    :param shares: files that show it its own share, see :mod:`.lxcfs`
    """
    caps = capabilities()
    ids = [{'containerID': 0, 'hostID': base_id, 'size': idmap.RANGE}]
    return {
        'ociVersion': '1.0.2',
        'process': {
            'terminal': True,
            'consoleSize': {'height': 25, 'width': 80},
            'user': {'uid': 0, 'gid': 0},
            'args': list(init.argv),
            'env': [f'{k}={v}' for k, v in init.env.items()],
            'cwd': '/',
            # No ambient set: it would hand every capability to each program
            # that a non-root user of the guest runs.
            'capabilities': {
                'bounding': caps, 'effective': caps, 'permitted': caps,
                'inheritable': [], 'ambient': []},
            'rlimits': rlimits(),
            'noNewPrivileges': False,
            'oomScoreAdj': 0,
        },
        'root': {'path': str(root), 'readonly': False},
        'hostname': hostname,
        'mounts': _mounts(config_drive, rescued, nodes, shares),
        'annotations': {'org.openstack.nova.instance': uuid},
        'linux': {
            'namespaces': [
                {'type': kind} for kind in (
                    'pid', 'network', 'ipc', 'uts', 'mount', 'cgroup')
            ] + _user(joined),
            'uidMappings': ids,
            'gidMappings': ids,
            'cgroupsPath': cgroups_path,
            'resources': {
                'devices': [
                    {'allow': False, 'access': 'rwm'},
                    # Volumes come while it runs, when no runtime changes
                    # these rules any more; CRIU does not restore them at all.
                    # A guest opens the nodes that it is given, see
                    # :mod:`.volume`.
                    {'allow': True, 'type': 'b', 'access': 'rw'},
                    {'allow': True, 'type': 'c',
                     'major': os.major(fuse.NUMBER),
                     'minor': os.minor(fuse.NUMBER), 'access': 'rw'},
                ],
                **resources},
            'seccomp': seccomp.profile(nesting=nesting),
            'maskedPaths': list(_MASKED),
            'readonlyPaths': list(_READ_ONLY),
            'rootfsPropagation': 'private',
        },
    }
