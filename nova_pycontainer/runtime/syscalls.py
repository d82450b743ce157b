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

"""System calls that Python does not wrap: one typed function each.

Numbers are those of ``include/uapi/asm-generic/unistd.h``; calls added since
Linux 5.2 have the same number on every architecture that Nova runs on.
Every function raises OSError with the name of the call and its object.
"""

import collections.abc as cabc
import contextlib
import ctypes
import os

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000

MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x00000080

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

PR_CAPBSET_READ = 23
CAP_SYS_RESOURCE = 24

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_OPENAT2 = 437
_SYS_PIDFD_GETFD = 438
_SYS_MOUNT_SETATTR = 442
_SYS_QUOTACTL_FD = 443

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ('attr_set', ctypes.c_uint64),
        ('attr_clr', ctypes.c_uint64),
        ('propagation', ctypes.c_uint64),
        ('userns_fd', ctypes.c_uint64),
    ]


class _OpenHow(ctypes.Structure):
    _fields_ = [
        ('flags', ctypes.c_uint64),
        ('mode', ctypes.c_uint64),
        ('resolve', ctypes.c_uint64),
    ]


class _CapHeader(ctypes.Structure):
    _fields_ = [('version', ctypes.c_uint32), ('pid', ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [
        ('effective', ctypes.c_uint32),
        ('permitted', ctypes.c_uint32),
        ('inheritable', ctypes.c_uint32),
    ]


def oserror(call: str, subject: str = '') -> OSError:
    """The error of the last libc call of this thread."""
    number = ctypes.get_errno()
    text = f'{call}: {os.strerror(number)}'
    return OSError(number, text, subject) if subject else OSError(number, text)


def _check(result: int, call: str, subject: str = '') -> int:
    if result < 0:
        raise oserror(call, subject)
    return result


def open_tree(path: str, flags: int, dirfd: int = AT_FDCWD) -> int:
    """Return an O_PATH descriptor of a mount, or of a detached copy of it."""
    return _check(
        _libc.syscall(
            _SYS_OPEN_TREE, dirfd, os.fsencode(path), ctypes.c_uint(flags)),
        'open_tree', path)


def move_mount_onto(from_fd: int, to_fd: int) -> None:
    """Attach the detached mount ``from_fd`` at what ``to_fd`` is open of."""
    _check(
        _libc.syscall(
            _SYS_MOVE_MOUNT, from_fd, b'', to_fd, b'',
            ctypes.c_uint(
                MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)),
        'move_mount')


def move_mount(from_fd: int, to_path: str) -> None:
    """Attach the detached mount ``from_fd`` at ``to_path``."""
    _check(
        _libc.syscall(
            _SYS_MOVE_MOUNT, from_fd, b'', AT_FDCWD, os.fsencode(to_path),
            ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)),
        'move_mount', to_path)


def fsopen(fstype: str) -> int:
    return _check(
        _libc.syscall(
            _SYS_FSOPEN, os.fsencode(fstype), ctypes.c_uint(FSOPEN_CLOEXEC)),
        'fsopen', fstype)


def fsconfig_string(fd: int, key: str, value: str) -> None:
    _check(
        _libc.syscall(
            _SYS_FSCONFIG, fd, ctypes.c_uint(FSCONFIG_SET_STRING),
            os.fsencode(key), os.fsencode(value), 0),
        'fsconfig', f'{key}={value}')


def fsconfig_flag(fd: int, key: str) -> None:
    _check(
        _libc.syscall(
            _SYS_FSCONFIG, fd, ctypes.c_uint(FSCONFIG_SET_FLAG),
            os.fsencode(key), None, 0),
        'fsconfig', key)


def fsconfig_create(fd: int) -> None:
    """Make the superblock. The kernel's reason is read from ``fd``."""
    result = _libc.syscall(
        _SYS_FSCONFIG, fd, ctypes.c_uint(FSCONFIG_CMD_CREATE), None, None, 0)
    if result < 0:
        error = oserror('fsconfig', 'create')
        try:
            # The message queue of the context says which option was refused
            # and why; errno alone is EINVAL for nearly everything.
            reason = os.read(fd, 1024).decode(errors='replace').strip()
        except OSError:
            reason = ''
        if reason:
            raise OSError(error.errno, f'{error.strerror} ({reason})')
        raise error


def fsmount(fd: int, attributes: int) -> int:
    return _check(
        _libc.syscall(
            _SYS_FSMOUNT, fd, ctypes.c_uint(FSMOUNT_CLOEXEC),
            ctypes.c_uint(attributes)),
        'fsmount')


def mount_setattr(
    fd: int, *, attr_set: int = 0, propagation: int = 0,
    userns_fd: int | None = None, recursive: bool = False,
) -> None:
    attr = _MountAttr(attr_set, 0, propagation, userns_fd or 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR, fd, b'', ctypes.c_uint(flags),
            ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr))),
        'mount_setattr')


def umount(path: str, flags: int = 0) -> None:
    _check(
        _libc.umount2(os.fsencode(path), ctypes.c_int(flags)),
        'umount2', path)


def openat2(
    dirfd: int, path: str, flags: int, resolve: int, mode: int = 0
) -> int:
    """Open ``path`` under the rules of ``resolve``: see openat2(2)."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    return _check(
        _libc.syscall(
            _SYS_OPENAT2, dirfd, os.fsencode(path), ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how))),
        'openat2', path)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """A copy of another process's descriptor: pidfd_getfd(2)."""
    return _check(
        _libc.syscall(
            _SYS_PIDFD_GETFD, pidfd, ctypes.c_int(number), ctypes.c_uint(0)),
        'pidfd_getfd')


def setns(fd: int, nstype: int) -> None:
    """Move the calling thread (only) into a namespace."""
    _check(_libc.setns(fd, ctypes.c_int(nstype)), 'setns')


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), 'unshare')


@contextlib.contextmanager
def files_of(ident: int) -> cabc.Iterator[None]:
    """Work on files as another user and group: setfsuid(2).

    A file system that was mounted in a user namespace does not know ids from
    outside, and answers EOVERFLOW to them. Of this thread only.
    """
    _libc.setfsgid(ident)
    _libc.setfsuid(ident)
    try:
        yield
    finally:
        _libc.setfsuid(os.getuid())
        _libc.setfsgid(os.getgid())


def mount_tmpfs(
    target: str, source: str, options: cabc.Mapping[str, str | None],
    attributes: int,
) -> None:
    """Mount a tmpfs that shows up in no other mount namespace.

    :param options: None is the value of those that have none
    """
    context = fsopen('tmpfs')
    try:
        fsconfig_string(context, 'source', source)
        for name, value in options.items():
            if value is None:
                fsconfig_flag(context, name)
            else:
                fsconfig_string(context, name, value)
        fsconfig_create(context)
        mount = fsmount(context, attributes)
    finally:
        os.close(context)
    try:
        mount_setattr(mount, propagation=MS_PRIVATE)
        move_mount(mount, target)
    finally:
        os.close(mount)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    _check(
        _libc.fallocate(
            fd, ctypes.c_int(mode), ctypes.c_long(offset),
            ctypes.c_long(size)),
        'fallocate')


def quotactl_fd(fd: int, command: int, ident: int, addr: object) -> None:
    _check(
        _libc.syscall(
            _SYS_QUOTACTL_FD, ctypes.c_uint(fd), ctypes.c_uint(command),
            ctypes.c_uint(ident), addr),
        'quotactl_fd')


def in_bounding_set(capability: int) -> bool:
    return bool(_libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1)


def set_effective(capability: int, on: bool) -> bool:
    """Raise or lower one capability of the calling thread.

    :returns: whether it was raised before
    """
    header = _CapHeader(0x20080522, 0)
    data = (_CapData * 2)()
    _check(_libc.capget(ctypes.byref(header), data), 'capget')
    word, bit = divmod(capability, 32)
    before = bool(data[word].effective & (1 << bit))
    if on:
        data[word].effective |= (1 << bit) & data[word].permitted
    else:
        data[word].effective &= ~(1 << bit)
    _check(_libc.capset(ctypes.byref(header), data), 'capset')
    return before
