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

"""A root on a volume: the volume's file system, mounted by the host's kernel.

What is on a volume was written by others, and a file system's code in the
kernel was not made to read what somebody has forged. So the host mounts only
types that its operator has permitted (``volume_filesystems``), none by
default, and only with options that take away what the content itself may ask
for.

The mount is idmapped: on the volume are the ids that the guest sees, so that
it is of use on any host, and to any server. It has no quota: the volume is
its own limit.
"""

import errno
import os
import pathlib
import subprocess
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import idmap
from nova_pycontainer.runtime import imagecheck
from nova_pycontainer.runtime import syscalls
from nova_pycontainer.runtime import volume

LOG = logging.getLogger(__name__)

#: Types that may be permitted, and the options of each.
TYPES: ty.Final[dict[str, dict[str, str | None]]] = {
    # The superblock may say ``panic``.
    'ext4': {'errors': 'remount-ro'},
    # A clone of a volume may be on the host that has the volume.
    'xfs': {'nouuid': None},
}
OPTION: ty.Final = '[pycontainer]volume_filesystems'

_PROBE_TIMEOUT = 60.0
#: blkid's exit codes.
_NOTHING, _AMBIVALENT = 2, 8
_BUSY_TIMEOUT = 30.0


def probe(path: str) -> dict[str, str]:
    """What blkid finds on a device: ``TYPE``, ``USAGE`` and others.

    :returns: nothing, if there is nothing that it knows
    :raises ContainerError: ``volume_unusable``: there are two things at once
    """
    argv = ['blkid', '--probe', '--output', 'export', path]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_PROBE_TIMEOUT)
    except subprocess.TimeoutExpired as e:
        raise errors.ContainerError(
            'timeout', f'{path} was not read within {_PROBE_TIMEOUT:.0f} s',
            remedy='See whether the storage of this host answers') from e
    except FileNotFoundError as e:
        raise errors.ContainerError(
            'unsupported', 'blkid is not installed',
            remedy='Install util-linux') from e
    if done.returncode == _AMBIVALENT:
        raise errors.ContainerError(
            'volume_unusable', 'the volume has signatures of several file '
            'systems', remedy='Make the volume anew, of zeros (wipefs)')
    if done.returncode not in (0, _NOTHING):
        raise errors.ContainerError(
            'internal', f'blkid failed on {path}',
            cause=done.stderr.decode(errors='replace').strip()[-400:])
    found = {}
    for line in done.stdout.decode(errors='replace').splitlines():
        key, equals, value = line.partition('=')
        if equals:
            found[key] = value
    return found


class BootVolume(disk.Disk):
    """The disk of a container whose root is a volume.

    :param permitted: types of file systems that may be mounted
    :param place: where the root of the container is mounted
    """

    def __init__(
        self, instance_dir: pathlib.Path, root: volume.Volume, base_id: int,
        permitted: ty.Collection[str], place: pathlib.Path,
    ) -> None:
        super().__init__(instance_dir, 'none', base_id, None)
        self.method = 'volume'
        self._volume = root
        self._permitted = permitted
        self._place = place
        #: There while the volume may be mounted. It lies with the volatile
        #: things: no mount outlives a boot of the host.
        self._marker = place.with_name(f'{place.name}.volume')

    def create(self) -> None:
        self.check_permitted()
        super().create()

    def check_permitted(self) -> None:
        """:raises ContainerError: ``volume_unusable``: not on this host"""
        if not self._permitted:
            raise errors.ContainerError(
                'volume_unusable', 'nothing boots from volumes on this host',
                remedy=f'Have {OPTION} set on it, or boot from an image')

    def mount(self) -> None:
        """Nothing: there is but one mount, :meth:`show`'s."""

    def show(self, target: pathlib.Path, layer: pathlib.Path) -> None:
        """Mount the volume.

        :raises ContainerError: ``volume_unusable``; ``invalid``: it is not
            connected; ``in_use``
        """
        self.check_permitted()
        device = volume.device_of(self._volume)
        # Also where we do not see it: in a namespace that somebody holds.
        if not self._is_free():
            raise errors.ContainerError(
                'in_use', f'{self._volume.path} of volume {self._volume.id} '
                'is in use on this host', remedy='See "pycontainer list", '
                'and lsblk, for what has it')
        kind = self._kind()
        target.mkdir(mode=0o755, exist_ok=True)
        self._marker.write_text(str(device))
        try:
            root = self._make(kind)
        except OSError as e:
            raise errors.ContainerError(
                'volume_unusable', f'the kernel does not mount the {kind} '
                f'of volume {self._volume.id}', cause=str(e),
                remedy='Repair it elsewhere (fsck), or boot from another '
                'volume') from e
        try:
            with idmap.userns_fd(self._base_id) as userns:
                syscalls.mount_setattr(
                    root, userns_fd=userns, propagation=syscalls.MS_PRIVATE,
                    attr_set=syscalls.MOUNT_ATTR_IDMAP)
            syscalls.move_mount(root, str(target))
        finally:
            os.close(root)

    def _kind(self) -> str:
        """The type of the file system, which may be mounted."""
        ident = self._volume.id
        if self._volume.read_only:
            raise errors.ContainerError(
                'volume_unusable', f'volume {ident} may only be read',
                remedy='Boot from one that may be written')
        found = probe(self._volume.path)
        kind = found.get('TYPE')
        if kind is None and 'PTTYPE' in found:
            raise errors.ContainerError(
                'volume_unusable', f'volume {ident} has partitions '
                f'({found["PTTYPE"]})', remedy='Make the file system on the '
                'whole volume, without a partition table')
        if kind is None or found.get('USAGE') != 'filesystem':
            raise errors.ContainerError(
                'volume_unusable', f'there is no file system on volume '
                f'{ident}', cause=kind, remedy='Make one, with the root of '
                'a system, on the whole volume')
        if kind not in TYPES or kind not in self._permitted:
            able = ', '.join(sorted({*TYPES} & {*self._permitted}))
            raise errors.ContainerError(
                'volume_unusable', f'volume {ident} has a file system of '
                f'type {kind}, and this host mounts only {able}',
                remedy=f'Permit it by {OPTION}' if kind in TYPES else
                'Make one of those types on it')
        if 'EXT_JOURNAL' in found:
            # The kernel would open the device that the superblock names.
            raise errors.ContainerError(
                'volume_unusable', f'the journal of volume {ident} is on '
                'another device', remedy='Give it one of its own (tune2fs)')
        return kind

    def _make(self, kind: str) -> int:
        context = syscalls.fsopen(kind)
        try:
            syscalls.fsconfig_string(context, 'source', self._volume.path)
            for name, value in TYPES[kind].items():
                if value is None:
                    syscalls.fsconfig_flag(context, name)
                else:
                    syscalls.fsconfig_string(context, name, value)
            syscalls.fsconfig_create(context)
            # Not nosuid: what runs as root there is the guest's.
            return syscalls.fsmount(context, syscalls.MOUNT_ATTR_NODEV)
        finally:
            os.close(context)

    def check_init(
        self, root: pathlib.Path, argv: list[str] | None
    ) -> None:
        """:raises ContainerError: ``volume_unusable``: nothing to start"""
        try:
            imagecheck.check_init(root, argv)
        except errors.ContainerError as e:
            raise errors.ContainerError(
                'volume_unusable', e.message.replace(
                    'the image', f'volume {self._volume.id}'),
                cause=e.cause, remedy='Boot from a volume with the root of '
                'a whole system for this host') from None

    def _is_free(self) -> bool:
        """Whether no file system has the device, in whatever namespace."""
        try:
            os.close(os.open(
                self._volume.path,
                os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as e:
            # One that is gone is free.
            return e.errno != errno.EBUSY
        return True

    def unmount(self) -> None:
        """Wait until the kernel has let go of the device; idempotent.

        Its mounts in the guest's namespace go some time after the last
        process, and to disconnect the volume before that loses what was not
        written yet.

        :raises OSError: it does not let go
        """
        try:
            device = int(self._marker.read_text())
        except (FileNotFoundError, ValueError):
            return
        deadline = time.monotonic() + _BUSY_TIMEOUT
        while self._is_here(device) and not self._is_free():
            if time.monotonic() > deadline:
                raise OSError(
                    errno.EBUSY, 'the file system of the volume does not '
                    f'let go of {blockio.number(device)}',
                    self._volume.path)
            time.sleep(0.01)
        self._marker.unlink(missing_ok=True)

    def _is_here(self, device: int) -> bool:
        # The path may be another volume's meanwhile.
        try:
            return os.stat(self._volume.path).st_rdev == device
        except OSError:
            return False

    def usage(self) -> tuple[int, int] | None:
        if not os.path.ismount(self._place):
            return None
        vfs = os.statvfs(self._place)
        used = (vfs.f_blocks - vfs.f_bfree) * vfs.f_frsize
        return used, vfs.f_bavail * vfs.f_frsize
