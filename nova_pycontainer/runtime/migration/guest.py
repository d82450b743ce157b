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

"""What CRIU leaves to its caller: found on the source, made on the
destination.

* mounts that come from the host (devices, masked files, the config drive);
* the tree of control groups, with owners, modes and limits;
* ramfs mounts (systemd's credentials): CRIU mounts them anew and empty.
"""

import base64
import collections.abc as cabc
import dataclasses
import errno
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import typing as ty

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import bundle
from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import fuse
from nova_pycontainer.runtime import lxcfs
from nova_pycontainer.runtime import procfs
from nova_pycontainer.runtime import syscalls
from nova_pycontainer.runtime import volume

#: Devices of the host that a container may have a bind mount of.
DEVICES = frozenset(['full', 'null', 'random', 'tty', 'urandom', 'zero'])

#: Of what a container's volumes are called in dumps.
_VOLUME = 'volume:'
_LXCFS = 'lxcfs:'
#: What its /dev/fuse is called in dumps.
FUSE: ty.Final = 'fuse'

FUSE_REMEDY: ty.Final = 'Load the module fuse (modprobe fuse)'

_RAMFS_LIMIT = 16 << 20


@dataclasses.dataclass(frozen=True)
class Mount:
    """A line of /proc/PID/mountinfo, proc_pid_mountinfo(5)."""

    id: int
    device: str
    root: str
    point: str
    fstype: str

    @classmethod
    def parse(cls, line: str) -> 'Mount':
        left, _, right = line.partition(' - ')
        columns = left.split(' ')
        return cls(int(columns[0]), columns[2], procfs.unescape(columns[3]),
                   procfs.unescape(columns[4]), right.split(' ')[0])


def mounts(pid: int) -> list[Mount]:
    return [Mount.parse(line)
            for line in procfs.lines(f'/proc/{pid}/mountinfo')]


def external_mounts(pid: int, nodes: volume.Nodes) -> dict[str, str]:
    """Mounts that come from the host: mount point → what of.

    :param nodes: of the container's volumes
    :returns: values are ``/dev/<name>`` of :data:`DEVICES`,
        ``volume:<name>``, ``lxcfs:<name>`` of :data:`.lxcfs.FILES`,
        :data:`FUSE`, or ``config-drive``
    :raises ContainerError: ``unsupported``: a mount of the host that we have
        not made
    """
    status = os.stat('/dev/null')
    device = blockio.number(status.st_dev)
    made = nodes.device()
    volumes = None if made is None else blockio.number(made)
    found = {}
    for mount in mounts(pid):
        share = lxcfs.name_of(mount.fstype, mount.root)
        if mount.point == bundle.CONFIG_DRIVE:
            found[mount.point] = 'config-drive'
        elif share is not None and mount.point == f'/{share}':
            found[mount.point] = f'{_LXCFS}{share}'
        elif (mount.device in (device, volumes) and
              mount.fstype != 'overlay'):
            name = os.path.basename(mount.root)
            of_volume = mount.device == volumes
            of_fuse = of_volume and name == fuse.NAME
            if not (of_fuse or (nodes.has(name) if of_volume
                                else name in DEVICES)) or (
                    not re.fullmatch(r'[\w./@:+-]+', mount.point)):
                raise errors.ContainerError(
                    'unsupported', f'the mount {mount.point} is of a device '
                    'of the host and cannot move',
                    remedy='Unmount it in the guest')
            found[mount.point] = FUSE if of_fuse else (
                f'{_VOLUME}{name}' if of_volume else f'/dev/{name}')
    return found


def shares_of(external: cabc.Mapping[str, str]) -> list[str]:
    """Which of :data:`.lxcfs.FILES` a guest has."""
    return sorted(source.removeprefix(_LXCFS) for source in external.values()
                  if source.startswith(_LXCFS))


def dump_externals(external: cabc.Mapping[str, str]) -> tuple[str, ...]:
    """CRIU's ``--external`` of a dump: the key is the mount point."""
    return tuple(f'mnt[{point}]:{point}' for point in external)


def restore_externals(
    external: cabc.Mapping[str, str], config_drive: pathlib.Path,
    nics: cabc.Mapping[str, str], nodes: volume.Nodes,
    shares: lxcfs.Lxcfs,
) -> tuple[str, ...]:
    """CRIU's ``--external`` of a restore.

    :param nics: name of an interface in the guest → that of its parked end
        on the host
    :param nodes: of the container's volumes
    :raises ContainerError: ``invalid``: the peer names another file;
        ``unsupported``: this host has no lxcfs, or no FUSE
    """
    result = []
    found = shares.require(shares_of(external))
    for point, source in external.items():
        if source == 'config-drive':
            source = str(config_drive)
        elif source.startswith(_VOLUME) and nodes.has(
                source.removeprefix(_VOLUME)):
            source = str(nodes.directory / source.removeprefix(_VOLUME))
        elif source == FUSE:
            if not nodes.fuse.exists():
                raise errors.ContainerError(
                    'unsupported', 'the guest has /dev/fuse, which this host '
                    'has not', remedy=FUSE_REMEDY)
            source = str(nodes.fuse)
        elif source.startswith(_LXCFS):
            source = str(found[source.removeprefix(_LXCFS)])
        elif (not source.startswith('/dev/') or
              source.removeprefix('/dev/') not in DEVICES):
            raise errors.ContainerError(
                'invalid', f'{source!r} is not a device of containers')
        result.append(f'mnt[{point}]:{source}')
    for inside, name in nics.items():
        result.append(f'netdev[{inside}]:{name}')
    return tuple(result)


# Control groups

#: Files of cgroup v2 that hold a setting, in the order of writing. Those that
#: a kernel or a hierarchy lacks are passed over.
_SETTINGS = (
    'cgroup.type', 'cgroup.subtree_control', 'cgroup.max.depth',
    'cgroup.max.descendants', 'cpu.weight', 'cpu.max', 'cpu.idle',
    'io.weight', 'memory.min', 'memory.low', 'memory.high', 'memory.max',
    'memory.swap.max', 'memory.oom.group', 'pids.max',
)
_OWNED = ('cgroup.procs', 'cgroup.subtree_control', 'cgroup.threads')


def save_cgroups(group: cgroup.Cgroup) -> list[dict[str, ty.Any]]:
    """The guest's own cgroups below the container's, parents first."""
    tree = []
    for directory, names, _ in os.walk(group.v2):
        names.sort()
        path = pathlib.Path(directory)
        status = path.stat()
        settings = {}
        for name in _SETTINGS:
            try:
                settings[name] = (path / name).read_text().strip()
            except OSError:
                continue
        tree.append({
            'path': str(path.relative_to(group.v2)),
            'uid': status.st_uid, 'gid': status.st_gid,
            'mode': stat.S_IMODE(status.st_mode), 'settings': settings,
            'owned': _owned(path, status),
        })
    return tree


def _owned(path: pathlib.Path, status: os.stat_result) -> list[str]:
    """Files of a cgroup that belong to its owner.

    All of them where a guest's process has made the cgroup: a user's systemd
    keeps ``memory.pressure`` open for writing.
    """
    return sorted(
        file.name for file in os.scandir(path)
        if file.is_file(follow_symlinks=False) and
        file.stat(follow_symlinks=False).st_uid == status.st_uid)


def _enables(item: cabc.Mapping[str, ty.Any]) -> bool:
    """Whether it is the container's own cgroup, and enables controllers."""
    return item['path'] == '.' and bool(
        item['settings'].get('cgroup.subtree_control'))


def has_controllers(tree: cabc.Iterable[cabc.Mapping[str, ty.Any]]) -> bool:
    """Whether a call for an occupied cgroup has left something to do."""
    return any(map(_enables, tree))


def make_cgroups(
    group: cgroup.Cgroup, tree: cabc.Sequence[cabc.Mapping[str, ty.Any]],
    base_id: int, occupied: bool = False,
) -> None:
    """Make the tree again. What differs is set, so it may be called twice.

    :param occupied: the container's own cgroup has to take a process once
        more, which it cannot while it enables controllers for those below
        (cgroups(7), "no internal processes"). These are left alone then, and
        what depends on them
    :raises ContainerError: ``invalid``: the peer names a path outside, or an
        owner that is not of the guest
    """
    for item in tree:
        path = pathlib.PurePosixPath(item['path'])
        ids = (int(item['uid']), int(item['gid']))
        if path.is_absolute() or '..' in path.parts:
            raise errors.ContainerError(
                'invalid', f'{path} is not a cgroup of the container')
        if not all(base_id <= i < base_id + 65536 for i in ids):
            raise errors.ContainerError(
                'invalid', f'cgroup {path} has the owner {ids}, who is not '
                'of the container')
        directory = group.v2 / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in item['settings'].items():
            if occupied and name == 'cgroup.subtree_control' and (
                    _enables(item)):
                continue
            if name in _SETTINGS:
                _set(directory / name, name, str(value))
        os.chmod(directory, int(item['mode']) & 0o777)
        os.chown(directory, *ids)
        for name in item['owned']:
            # The limits of the container itself are never the guest's.
            if name in _OWNED or (path.parts and '/' not in name and
                                  (directory / name).exists()):
                os.chown(directory / name, *ids)


def _set(file: pathlib.Path, name: str, value: str) -> None:
    try:
        if file.read_text().strip() == value:
            return
        if name == 'cgroup.subtree_control':
            value = ' '.join(f'+{c}' for c in value.split())
        if value:
            file.write_text(value)
    except OSError as e:
        # A controller or a setting that this host's kernel has not.
        if e.errno not in (errno.ENOENT, errno.EINVAL, errno.EACCES,
                           errno.EOPNOTSUPP, errno.ENOTSUP):
            raise


# ramfs

def save_ramfs(pid: int) -> list[dict[str, ty.Any]]:
    """Content of every ramfs mount of a frozen container.

    Read through /proc/PID/root by a path that is resolved within that root
    and checked to be on that mount: a guest may have mounted over it.

    :raises ContainerError: ``unsupported``: more than 16 MiB
    """
    root = os.open(f'/proc/{pid}/root', os.O_PATH | os.O_DIRECTORY)
    saved: list[dict[str, ty.Any]] = []
    budget = _RAMFS_LIMIT
    try:
        for mount in mounts(pid):
            if mount.fstype != 'ramfs':
                continue
            try:
                fd = syscalls.openat2(
                    root, mount.point.lstrip('/') or '.',
                    os.O_RDONLY | os.O_DIRECTORY, syscalls.RESOLVE_IN_ROOT)
            except OSError:
                continue
            try:
                if _mount_id(fd) != mount.id:
                    continue
                entries, budget = _save_tree(fd, '.', budget)
            finally:
                os.close(fd)
            saved.append({'id': mount.id, 'point': mount.point,
                          'entries': entries})
    finally:
        os.close(root)
    return saved


def _mount_id(fd: int) -> int:
    for line in procfs.lines(f'/proc/self/fdinfo/{fd}'):
        if line.startswith('mnt_id:'):
            return int(line.split()[1])
    return -1


def _save_tree(
    top: int, path: str, budget: int
) -> tuple[list[dict[str, ty.Any]], int]:
    status = os.stat(path, dir_fd=top, follow_symlinks=False)
    item: dict[str, ty.Any] = {
        'path': path, 'mode': status.st_mode, 'uid': status.st_uid,
        'gid': status.st_gid, 'mtime': status.st_mtime_ns}
    result = [item]
    if stat.S_ISDIR(status.st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW,
                     dir_fd=top)
        try:
            names = sorted(os.listdir(fd))
        finally:
            os.close(fd)
        for name in names:
            below, budget = _save_tree(
                top, f'{path}/{name}', budget)
            result += below
    elif stat.S_ISREG(status.st_mode):
        budget -= status.st_size
        if budget < 0:
            raise errors.ContainerError(
                'unsupported', 'the guest has more than '
                f'{_RAMFS_LIMIT >> 20} MiB in ramfs mounts, which CRIU does '
                'not move', remedy='Use tmpfs in the guest')
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=top)
        with os.fdopen(fd, 'rb') as f:
            item['data'] = base64.b64encode(f.read()).decode()
    elif stat.S_ISLNK(status.st_mode):
        item['target'] = os.readlink(path, dir_fd=top)
    return result, budget


class RamfsFiller:
    """Fills the ramfs mounts of a container that is being restored.

    CRIU assembles a mount namespace from detached trees below
    ``/tmp/.criu.mntns.*/mnt-<id>``, which only that namespace sees and only a
    process without threads may enter. That process is started before the
    guest is frozen, so that it costs no blackout.
    """

    def __init__(self, python: str | None = None) -> None:
        script = pathlib.Path(__file__).with_name('ramfs_fill.py')
        self._process = subprocess.Popen(
            [python or sys.executable, '-I', '-S', str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True)

    def fill(
        self, pid: int, saved: cabc.Sequence[cabc.Mapping[str, ty.Any]],
        base_id: int,
    ) -> None:
        """:param pid: the process that CRIU restores the mounts in

        :raises ContainerError: ``internal``
        """
        if not saved:
            return
        try:
            _, text = self._process.communicate(json.dumps({
                'pid': pid, 'base_id': base_id, 'mounts': list(saved)}),
                timeout=30)
        except subprocess.TimeoutExpired as e:
            raise errors.ContainerError(
                'timeout', 'filling the ramfs mounts takes too long') from e
        if self._process.returncode:
            raise errors.ContainerError(
                'internal', 'the ramfs mounts cannot be filled',
                cause=text.strip()[-500:])

    def close(self) -> None:
        """Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
