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

"""Volumes: block devices of the host that a container has in its ``/dev``.
And the one other device that is made in the same way, ``/dev/fuse``.

A guest cannot make device nodes, and those on its own file systems are dead:
mknod(2) in a user namespace is refused, and what is mounted there is
``nodev``. So a node is made here, on a tmpfs of the container's own outside
of it, and bound into its ``/dev``. All mounts of it, also those that the guest
makes, are of one inode, whose owner and mode are the permission: who is not
mapped into the user namespace is out of reach of its root's capabilities.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import stat
import typing as ty

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import fuse
from nova_pycontainer.runtime import namespaces
from nova_pycontainer.runtime import procfs
from nova_pycontainer.runtime import syscalls

#: Names as virtual machines have them; none is one of a system container's
#: own devices.
_NAME = re.compile(r'(?:x?v|s|h)d[a-z]{1,3}\Z')
_ID = re.compile(r'[0-9A-Za-z._-]{1,255}\Z')
_SECTOR = 512
_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOEXEC

#: Of a mount point in the guest; nobody opens it before the device is there.
_PLACE_MODE = 0o600
#: As the distributions' udev has it.
_FUSE_MODE = 0o666


@dataclasses.dataclass(frozen=True)
class Volume:
    """A block device.

    :param id: what the caller calls it
    :param name: in the guest's ``/dev``
    :param path: on the host
    """

    id: str
    name: str
    path: str
    read_only: bool

    @classmethod
    def from_dict(cls, data: object) -> 'Volume':
        """:raises ContainerError: ``invalid``, naming the field"""
        if not isinstance(data, dict):
            raise errors.ContainerError('invalid', 'a volume is no object')
        name, ident = str(data.get('name')), str(data.get('id'))
        path = str(data.get('path'))
        if not _NAME.match(name):
            raise errors.ContainerError(
                'invalid', f'{name!r} is no name for a volume',
                remedy='Take one like vdb')
        if not _ID.match(ident):
            raise errors.ContainerError(
                'invalid', f'{ident!r} is no id of a volume')
        if not path.startswith('/') or '\0' in path:
            raise errors.ContainerError(
                'invalid', f'volume {ident}: {path!r} is no absolute path')
        return cls(ident, name, path, bool(data.get('read_only', False)))

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


def parse(value: object) -> tuple[Volume, ...]:
    """:raises ContainerError: ``invalid``"""
    if not isinstance(value, list | tuple):
        raise errors.ContainerError('invalid', 'volumes is no list')
    found = tuple(Volume.from_dict(item) for item in value)
    for kind in ('id', 'name'):
        if len({getattr(v, kind) for v in found}) != len(found):
            raise errors.ContainerError(
                'invalid', f'two volumes have one {kind}')
    return found


def device_of(volume: Volume) -> int:
    """Number of the device.

    :raises ContainerError: ``invalid``: there is none, or it is the host's
        own
    """
    try:
        status = os.stat(volume.path)
    except OSError as e:
        raise errors.ContainerError(
            'invalid', f'volume {volume.id} is not connected to this host',
            cause=str(e), remedy='Reboot the server hard, which connects its '
            'volumes anew') from e
    if not stat.S_ISBLK(status.st_mode):
        raise errors.ContainerError(
            'invalid', f'volume {volume.id}: {volume.path} is no block '
            'device', remedy='Volumes that are files, as those of NFS, are '
            'not supported')
    number = blockio.number(status.st_rdev)
    if any(line.split(' ', 3)[2] == number
           for line in procfs.lines('/proc/self/mountinfo')):
        raise errors.ContainerError(
            'invalid', f'volume {volume.id}: the host itself has '
            f'{volume.path} mounted')
    return status.st_rdev


def statistics(volume: Volume) -> dict[str, int] | None:
    """Size and use since the device is there.

    From sysfs, Documentation/block/stat in the kernel's sources; None if it
    is not there.
    """
    try:
        directory = pathlib.Path(
            '/sys/dev/block', blockio.number(os.stat(volume.path).st_rdev))
        numbers = [*map(int, (directory / 'stat').read_text().split())]
        size = int((directory / 'size').read_text())
    except OSError:
        return None
    return {'size_bytes': size * _SECTOR,
            'read_requests': numbers[0], 'read_bytes': numbers[2] * _SECTOR,
            'write_requests': numbers[4], 'write_bytes': numbers[6] * _SECTOR}


def _close(node: pathlib.Path) -> os.stat_result:
    before = os.stat(node)
    os.chown(node, 0, 0)
    os.chmod(node, 0)
    return before


class Nodes:
    """The device nodes of one container.

    :param directory: where they are, a tmpfs while there are any
    :param base_id: first host id of the container's user namespace
    """

    def __init__(self, directory: pathlib.Path, base_id: int) -> None:
        self.directory = directory
        self._base_id = base_id

    def path(self, volume: Volume) -> pathlib.Path:
        return self.directory / volume.name

    @property
    def fuse(self) -> pathlib.Path:
        return self.directory / fuse.NAME

    def has(self, name: str) -> bool:
        return bool(_NAME.match(name)) and (self.directory / name).exists()

    def number(self, volume: Volume) -> int | None:
        """Number of the device of a node; None: there is none."""
        try:
            return os.stat(self.path(volume)).st_rdev
        except FileNotFoundError:
            return None

    def device(self) -> int | None:
        """Number of the file system; None if there are no nodes."""
        if not os.path.ismount(self.directory):
            return None
        return os.stat(self.directory).st_dev

    def make(self, volumes: cabc.Iterable[Volume]) -> None:
        """Make nodes, and the file system for them; idempotent.

        :raises ContainerError: ``invalid``
        """
        for volume in volumes:
            self._mount()
            node = self.path(volume)
            number = device_of(volume)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(node)
            os.mknod(node, stat.S_IFBLK, number)
            self._allow(volume)

    def make_fuse(self) -> None:
        """Make ``/dev/fuse``, if this host has it; idempotent.

        It is not the host's own node: whether others may open that depends on
        the host's udev.
        """
        if not fuse.of_host():
            return
        self._mount()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.fuse)
        try:
            os.mknod(self.fuse, stat.S_IFCHR, fuse.NUMBER)
        except PermissionError:
            # A host that is a container itself and may not.
            return
        os.chown(self.fuse, self._base_id, self._base_id)
        os.chmod(self.fuse, _FUSE_MODE)

    def _allow(self, volume: Volume) -> None:
        node = self.path(volume)
        if volume.read_only:
            # An owner could change the mode.
            os.chown(node, 0, self._base_id)
            os.chmod(node, 0o440)
        else:
            os.chown(node, self._base_id, self._base_id)
            os.chmod(node, 0o660)

    def revoke(self, volume: Volume) -> os.stat_result | None:
        """Have nobody open it any more, through whatever mount of it.

        :returns: for :meth:`give_back`; None: there is no such node
        """
        try:
            return _close(self.path(volume))
        except FileNotFoundError:
            return None

    def give_back(self, volume: Volume, before: os.stat_result) -> None:
        """End :meth:`revoke`: a guest may have given it to somebody."""
        os.chown(self.path(volume), before.st_uid, before.st_gid)
        os.chmod(self.path(volume), stat.S_IMODE(before.st_mode))

    def reopen(
        self, volume: Volume, before: os.stat_result | None = None
    ) -> None:
        """End :meth:`revoke` if it is in force; idempotent.

        :param before: what it has returned; None: it is not known any more
        """
        try:
            status = os.stat(self.path(volume))
        except FileNotFoundError:
            return
        if (status.st_uid, stat.S_IMODE(status.st_mode)) != (0, 0):
            return
        if before is None:
            self._allow(volume)
        else:
            self.give_back(volume, before)

    def remove(self, volume: Volume) -> None:
        self.revoke(volume)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(volume))

    def unmount(self) -> None:
        """Remove all; idempotent."""
        if os.path.ismount(self.directory):
            for node in self.directory.iterdir():
                # A mount of it may be left in a namespace that somebody
                # holds.
                _close(node)
            syscalls.umount(str(self.directory), syscalls.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            self.directory.rmdir()

    def _mount(self) -> None:
        if os.path.ismount(self.directory):
            return
        # The guest's init passes through it while CRIU restores its mounts.
        self.directory.mkdir(mode=0o711, exist_ok=True)
        syscalls.mount_tmpfs(
            str(self.directory), 'volumes', {'size': '64k', 'mode': '0711'},
            _ATTRIBUTES)

    # In a guest that runs

    def show(self, volume: Volume, pid: int) -> None:
        """Bind a node into the guest's ``/dev``.

        :param pid: of the guest's init
        :raises ContainerError: ``exists``: the guest has a file there
        """
        tree = syscalls.open_tree(
            str(self.path(volume)),
            syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
        try:
            syscalls.mount_setattr(
                tree, propagation=syscalls.MS_PRIVATE, attr_set=_ATTRIBUTES)
            namespaces.within(
                'mnt', pid, lambda: self._put(volume.name, tree))
        finally:
            os.close(tree)

    def _put(self, name: str, tree: int) -> None:
        with self._dev() as dev:
            try:
                with syscalls.files_of(self._base_id):
                    os.close(os.open(
                        name, os.O_CREAT | os.O_EXCL | os.O_WRONLY,
                        _PLACE_MODE, dir_fd=dev))
            except FileExistsError:
                raise errors.ContainerError(
                    'exists', f'the guest has a file /dev/{name}',
                    remedy='Remove it, or attach the volume under another '
                    'name') from None
            try:
                place = syscalls.openat2(
                    dev, name, os.O_PATH | os.O_NOFOLLOW,
                    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS |
                    syscalls.RESOLVE_NO_XDEV)
                try:
                    syscalls.move_mount_onto(tree, place)
                finally:
                    os.close(place)
            except BaseException:
                with contextlib.suppress(OSError), (
                        syscalls.files_of(self._base_id)):
                    os.unlink(name, dir_fd=dev)
                raise

    @staticmethod
    @contextlib.contextmanager
    def _dev() -> cabc.Iterator[int]:
        root = os.open('/', os.O_PATH | os.O_DIRECTORY)
        try:
            dev = syscalls.openat2(
                root, 'dev', os.O_PATH | os.O_DIRECTORY,
                syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
        finally:
            os.close(root)
        try:
            yield dev
        finally:
            os.close(dev)

    def hide(
        self, volume: Volume, points: cabc.Mapping[int, cabc.Sequence[str]],
    ) -> None:
        """Unmount a node in the guest.

        :param points: pid of a process of each of the guest's mount
            namespaces that have it → its mount points of the node
        """
        def unmount(paths: cabc.Sequence[str]) -> None:
            for path in paths:
                # Whatever the guest has made of the path meanwhile is its
                # own.
                with contextlib.suppress(OSError):
                    syscalls.umount(
                        path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
            with contextlib.suppress(OSError), self._dev() as dev:
                status = os.stat(
                    volume.name, dir_fd=dev, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and not status.st_size:
                    with syscalls.files_of(self._base_id):
                        os.unlink(volume.name, dir_fd=dev)

        for pid, paths in points.items():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                namespaces.within(
                    'mnt', pid, functools.partial(unmount, paths))
