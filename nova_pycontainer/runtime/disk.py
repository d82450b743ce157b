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

"""A container's own files, and the limit on their size (Nova's DISK_GB).

``<instance>/disk/`` holds ``upper/`` and ``work/`` of the overlay. What makes
it bounded differs by host:

``project``
    a project quota (ext4, xfs). The file system of the state directory must
    be mounted with ``prjquota``. No cost per container.
``loop``
    an ext4 file system of that size in a file, whose blocks are reserved when
    it is made. Works everywhere, and costs a superblock and a journal thread
    for each running container.
``sparse``
    the same in a sparse file. When the host's disk is full, what the container
    has written and not yet synced is lost, and its file system may be damaged:
    the kernel finds no place for what it has long promised to write.
``none``
    no limit; only when the operator says so, or the flavor has no disk.
"""

import ctypes
import errno
import fcntl
import os
import pathlib
import struct
import subprocess
import time

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import overlay
from nova_pycontainer.runtime import syscalls

LOG = logging.getLogger(__name__)

METHODS = ('auto', 'project', 'loop', 'sparse', 'none')
#: Those whose disk is a file system in a file.
IN_FILE = ('loop', 'sparse')

# <linux/fs.h>
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_PROJINHERIT = 0x00000200
_FSXATTR = struct.Struct('=IIIII8x')

# <linux/falloc.h>
_FALLOC_FL_KEEP_SIZE = 0x01

# <linux/quota.h>
_PRJQUOTA = 2
_Q_SETQUOTA = 0x800008
_Q_GETQUOTA = 0x800007
_QIF_LIMITS = 0x5
_QUOTA_BLOCK = 1024

_TIMEOUT = 120.0
#: It must not be killed in the middle.
_RESIZE_TIMEOUT = 6 * 3600.0
_MOUNT = ('mount', '-t', 'ext4', '-o', 'noatime,nodev')
_BUSY_TIMEOUT = 10.0
#: One inode for each 16 KiB, mke2fs' own default.
_BYTES_PER_INODE = 16384
_LOOP_MIN_BYTES = 32 << 20


class _DqBlk(ctypes.Structure):
    """struct if_dqblk"""

    _fields_ = [
        ('bhardlimit', ctypes.c_uint64),
        ('bsoftlimit', ctypes.c_uint64),
        ('curspace', ctypes.c_uint64),
        ('ihardlimit', ctypes.c_uint64),
        ('isoftlimit', ctypes.c_uint64),
        ('curinodes', ctypes.c_uint64),
        ('btime', ctypes.c_uint64),
        ('itime', ctypes.c_uint64),
        ('valid', ctypes.c_uint32),
    ]


def project_quota_works(path: pathlib.Path) -> bool:
    """Whether the file system of ``path`` accounts for projects.

    Asked of the kernel and not of the mount options: ext4 accepts
    ``prjquota`` on a kernel that has no quota format compiled in.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        block = _DqBlk()
        syscalls.quotactl_fd(
            fd, (_Q_GETQUOTA << 8) | _PRJQUOTA, 0, ctypes.byref(block))
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def choose_method(wanted: str, state_dir: pathlib.Path) -> str:
    """Return the method in force on this host.

    :raises ContainerError: ``unsupported``: ``project`` was asked for and
        the file system cannot do it
    """
    if wanted not in METHODS:
        raise errors.ContainerError(
            'invalid', f'disk_limit is {wanted!r}, not one of {METHODS}')
    if wanted == 'auto':
        return 'project' if project_quota_works(state_dir) else 'loop'
    if wanted == 'project' and not project_quota_works(state_dir):
        raise errors.ContainerError(
            'unsupported',
            f'the file system of {state_dir} has no project quotas',
            remedy='Mount it with prjquota, or set [pycontainer] '
                   'disk_limit = loop')
    return wanted


class Disk:
    """The disk of one container, in the directory of its instance."""

    def __init__(
        self, instance_dir: pathlib.Path, method: str, base_id: int,
        limit: int | None, project: int | None = None,
    ) -> None:
        """
        :param project: number of its quota, where that is not the first id's
        """
        self.method = self._host_method = method
        self._method = 'none' if limit is None else method
        self._base_id = base_id
        # The base id is distinct for each instance of the host and fits the
        # 32 bits of a project id.
        self._project = base_id if project is None else project
        self._limit = limit or 0
        self._image = instance_dir / 'disk.img'
        #: The file has become larger, and its file system not yet.
        self._grown = instance_dir / 'disk.grown'
        self.directory = instance_dir / 'disk'
        self.upper = self.directory / 'upper'
        self.work = self.directory / 'work'

    @property
    def in_file(self) -> bool:
        """Whether it is a file system of its own, in a file."""
        return self._method in IN_FILE

    def create(self) -> None:
        """Make the disk, empty. Mounting is :meth:`mount`'s."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if self._method == 'project':
            self._set_project()
        elif self.in_file:
            self._make_image()

    def _make_image(self) -> None:
        size = max(self._limit, _LOOP_MIN_BYTES)
        fd = os.open(
            self._image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
            0o600)
        try:
            os.ftruncate(fd, size)
            self._reserve(fd, size)
        finally:
            os.close(fd)
        _run([
            'mkfs.ext4', '-q', '-F', '-m', '0', '-i', str(_BYTES_PER_INODE),
            '-I', '256', '-J', 'size=4', '-O', '^resize_inode,^huge_file',
            # The file is new, so it reads as zeros: nothing must be written,
            # now or by the kernel's lazy initialisation later, which would
            # fill holes; and none must be made in what is reserved.
            '-E', 'assume_storage_prezeroed=1,nodiscard,root_owner=0:0',
            str(self._image)])

    def _reserve(self, fd: int, size: int) -> None:
        """Have the host's file system promise what ours promises in turn.

        :raises ContainerError: ``no_space``
        """
        if self._method != 'loop':
            return
        try:
            syscalls.fallocate(fd, _FALLOC_FL_KEEP_SIZE, 0, size)
        except OSError as e:
            # What it has got until then lies behind the end.
            os.ftruncate(fd, os.fstat(fd).st_size)
            if e.errno == errno.EOPNOTSUPP:
                LOG.warning(
                    '%s cannot be reserved on this file system; it will be '
                    'damaged when the disk is full', self._image)
                return
            if e.errno not in errors.FULL:
                raise
            raise errors.ContainerError(
                'no_space', f'no {size >> 20} MiB are left for the disk',
                cause=str(e), remedy='Free some space in the state '
                'directory of the host') from e

    def _set_project(self) -> None:
        project = self._project
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            raw = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
            flags, extsize, nextents, _, cow = _FSXATTR.unpack(raw)
            fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(
                flags | _FS_XFLAG_PROJINHERIT, extsize, nextents, project,
                cow))
            block = _DqBlk(
                # 0: none.
                bhardlimit=self._limit // _QUOTA_BLOCK,
                ihardlimit=(self._limit and max(
                    self._limit // _BYTES_PER_INODE, 16384)),
                valid=_QIF_LIMITS)
            syscalls.quotactl_fd(
                fd, (_Q_SETQUOTA << 8) | _PRJQUOTA, project,
                ctypes.byref(block))
        finally:
            os.close(fd)

    def mount(self) -> None:
        """Make ``upper`` and ``work`` usable; idempotent."""
        if self.in_file and not os.path.ismount(self.directory):
            self._mount_image()
        for path, owner in ((self.upper, self._base_id), (self.work, 0)):
            if not path.exists():
                path.mkdir(mode=0o755)
                os.chown(path, owner, owner)

    def _mount_image(self) -> None:
        # Direct I/O keeps the file's pages out of the page cache, where each
        # block of the container would lie twice.
        device = _run([
            'losetup', '--find', '--show', '--nooverlap', '--direct-io=on',
            str(self._image)]).strip()
        try:
            faults.point('disk.attached')
            _run([*_MOUNT, device, str(self.directory)])
            self._grow(device)
        finally:
            # Detaching a device in use makes it detach itself at the last
            # unmount.
            _run(['losetup', '--detach', device])

    def _grow(self, device: str) -> None:
        """Let the file system have all of a file that has become larger.

        The kernel does it while it is mounted, as one of its transactions.
        """
        if not self._grown.exists():
            return
        try:
            _run(['resize2fs', device])
        except errors.ContainerError as e:
            if 'Permission denied' not in (e.cause or ''):
                raise
            # Without CAP_SYS_RESOURCE, as root of some machines is, only a
            # file system that is not mounted can be made larger.
            LOG.info('%s cannot grow while it is mounted', self._image)
            syscalls.umount(str(self.directory), syscalls.UMOUNT_NOFOLLOW)
            _run(['e2fsck', '-fp', device], fine=(0, 1),
                 timeout=_RESIZE_TIMEOUT)
            _run(['resize2fs', device], timeout=_RESIZE_TIMEOUT)
            _run([*_MOUNT, device, str(self.directory)])
        self._grown.unlink()

    def show(self, target: pathlib.Path, layer: pathlib.Path) -> None:
        """Mount the root of a container, of an image's layer and this."""
        overlay.mount(
            target, layer=layer, upper=self.upper, work=self.work,
            base_id=self._base_id)

    def unmount(self) -> None:
        """Let go of the file system; idempotent.

        The kernel takes the mounts of a namespace down some time after its
        last process is gone, and then lets go of what lies below.
        """
        deadline = time.monotonic() + _BUSY_TIMEOUT
        while os.path.ismount(self.directory):
            try:
                syscalls.umount(str(self.directory), syscalls.UMOUNT_NOFOLLOW)
            except OSError as e:
                if e.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if self.in_file:
            self._detach()

    def _detach(self) -> None:
        """Detach devices that an agent has left behind which was killed
        before it could say that they shall detach themselves.
        """
        # loop(4): as the kernel knows it, without symbolic links.
        image = os.path.realpath(self._image)
        for file in pathlib.Path('/sys/block').glob('loop*/loop/backing_file'):
            try:
                if (file.read_text().rstrip('\n') != image or
                        file.with_name('autoclear').read_text() != '0\n'):
                    continue
            except OSError:
                # It has detached itself.
                continue
            LOG.warning('%s is still attached', self._image)
            _run(['losetup', '--detach', f'/dev/{file.parents[1].name}'])

    def resize(self, limit: int | None) -> None:
        """Change the limit of a disk.

        A file system in a file only grows, at its next mount: to make one
        smaller is to move what is on it, and a crash would lose it.

        :raises ContainerError: ``unsupported``: a disk with a limit cannot
            become one without, or the other way round
        """
        if self._host_method == 'none':
            return
        if not self._limit or (limit is None and self.in_file):
            raise errors.ContainerError(
                'unsupported', 'a disk without a limit cannot get one here, '
                'nor lose it', remedy='Migrate it to another host with that')
        if self.in_file and limit and limit > self._image.stat().st_size:
            fd = os.open(self._image, os.O_RDWR | os.O_CLOEXEC)
            try:
                # What was already used is safe as it is: only this can fail.
                self._reserve(fd, limit)
                self._grown.touch()
                os.ftruncate(fd, limit)
            finally:
                os.close(fd)
        self._limit = limit or 0
        if self._method == 'project':
            self._set_project()

    def usage(self) -> tuple[int, int] | None:
        """Bytes used and bytes free, or None while it is not mounted."""
        if self.in_file and not os.path.ismount(self.directory):
            return None
        try:
            vfs = os.statvfs(self.directory)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return None
            raise
        used = (vfs.f_blocks - vfs.f_bfree) * vfs.f_frsize
        return used, vfs.f_bavail * vfs.f_frsize

    def clear_limit(self) -> None:
        """Forget the project's limit; the directory is about to go."""
        if self._method != 'project' or not self.directory.exists():
            return
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            syscalls.quotactl_fd(
                fd, (_Q_SETQUOTA << 8) | _PRJQUOTA, self._project,
                ctypes.byref(_DqBlk(valid=_QIF_LIMITS)))
        finally:
            os.close(fd)


def _run(argv: list[str], *, fine: tuple[int, ...] = (0,),
         timeout: float = _TIMEOUT) -> str:
    """:param fine: exit codes that are no failure"""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout)
    except subprocess.TimeoutExpired as e:
        raise errors.ContainerError(
            'timeout', f'{argv[0]} did not end within {timeout:.0f} s',
        ) from e
    except FileNotFoundError as e:
        raise errors.ContainerError(
            'unsupported', f'{argv[0]} is not installed',
            remedy='Install e2fsprogs and util-linux') from e
    if done.returncode not in fine:
        text = done.stderr.strip()
        code = 'no_space' if 'No space left' in text else 'internal'
        raise errors.ContainerError(
            code, f'{argv[0]} failed', cause=text or f'{done.returncode}')
    return done.stdout
