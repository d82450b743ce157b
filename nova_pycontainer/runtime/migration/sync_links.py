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

"""Hard links of a layer, of which a guest has changed the file.

In an overlay with ``index=on`` the names ``a`` and ``b`` of one file of the
layer stay one file when the guest writes to ``a``. But the upper then holds
only ``a``; that ``b`` is the same file is known to the index, in the work
directory, by handles of this host's file system. A copy of the upper alone
would show the old file as ``b`` (or, if ``a`` was deleted since, would have
lost the new one altogether).

So before the upper is copied, the names that are missing in it are put there.
The kernel does that when asked to change something through such a name: it
links the upper's file there and makes the parents, with their owners and
attributes (``ovl_link_up()`` in fs/overlayfs/copy_up.c). The change asked for
is to set the time of access to what it is.
"""

import collections
import contextlib
import ctypes
import errno
import os
import pathlib
import stat
import subprocess
import tempfile
import threading
import time
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import syscalls

_TIMEOUT = 600.0
_KILL_TIMEOUT = 10.0
_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS
#: Errors that say "not there" of a name in a tree that a guest changes.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


#: The names, relative to the layer's root, of one of its files.
Group: ty.TypeAlias = tuple[bytes, ...]

_UTIME_OMIT = (1 << 30) - 2
_AT_SYMLINK_NOFOLLOW = 0x100
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = [('tv_sec', ctypes.c_long), ('tv_nsec', ctypes.c_long)]


_cache: dict[tuple[str, int, int], tuple[Group, ...]] = {}
_cache_lock = threading.Lock()


def layer_groups(layer: pathlib.Path) -> tuple[Group, ...]:
    """Files of a layer with more than one name. Found once, then kept:
    layers do not change.

    :param layer: its root directory
    """
    info = layer.stat()
    key = str(layer), info.st_dev, info.st_ino
    with _cache_lock:
        if key not in _cache:
            with Finder(layer) as finder:
                _cache[key] = tuple(
                    finder.groups(time.monotonic() + _TIMEOUT))
        return _cache[key]


class Finder:
    """Finds the files below a directory that have several names there.

    The search goes on in the background from the beginning.
    """

    def __init__(self, top: pathlib.Path) -> None:
        self._top = top
        self._output = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            # Whiteouts, which are devices, share inodes at overlayfs' own
            # discretion.
            ['find', '.', '!', '-type', 'd', '!', '-type', 'c', '!', '-type',
             'b', '-links', '+1', '-printf', r'%i %P\0'], cwd=top,
            stdin=subprocess.DEVNULL, stdout=self._output.fileno(),
            stderr=subprocess.PIPE)

    def __enter__(self) -> 'Finder':
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=_KILL_TIMEOUT)
        self._output.close()

    def groups(self, deadline: float) -> ty.Iterator[Group]:
        """Wait for the end of the search, and return what it has found.

        :param deadline: by the monotonic clock
        :raises ContainerError: ``timeout``, ``internal``
        """
        try:
            _, complaint = self._process.communicate(
                timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired as e:
            raise errors.ContainerError(
                'timeout', f'listing the files of {self._top} takes too long',
                cause=str(e)) from e
        if self._process.returncode:
            raise errors.ContainerError(
                'internal', f'the files of {self._top} cannot be listed',
                cause=complaint.decode('utf-8', 'replace')[-500:])
        groups: dict[bytes, list[bytes]] = collections.defaultdict(list)
        self._output.seek(0)
        for record in self._output.read().split(b'\0')[:-1]:
            inode, _, name = record.partition(b' ')
            groups[inode].append(name)
        for names in groups.values():
            if len(names) > 1:
                yield tuple(sorted(names))


def link_aliases(
    layer: pathlib.Path, merged: pathlib.Path, upper: pathlib.Path
) -> list[str]:
    """Put into the upper every name of a layer's file that has changed.

    The guest notices nothing but a new time of change (ctime) of these files.
    What it changes while it runs may need another call, when it is frozen.

    :param layer: root directory of the layer
    :param merged: where the overlay is mounted
    :returns: the names that were put there
    :raises ContainerError: ``no_space``: the guest's disk is full
    """
    linked = []
    root = os.open(merged, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        top = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for group in layer_groups(layer):
                original = os.lstat(layer / os.fsdecode(group[0]))
                for name in group:
                    if _link(root, top, name, original.st_ctime_ns):
                        linked.append(os.fsdecode(name))
        finally:
            os.close(top)
    finally:
        os.close(root)
    return linked


def _parent(root: int, name: bytes) -> int | None:
    """A descriptor of the directory of ``name``, or None."""
    directory = os.fsdecode(os.path.dirname(name)) or '.'
    try:
        return syscalls.openat2(
            root, directory, os.O_PATH | os.O_DIRECTORY, _RESOLVE)
    except OSError as e:
        if e.errno in _GONE:
            return None
        raise


def _lstat(root: int, name: bytes) -> os.stat_result | None:
    parent = _parent(root, name)
    if parent is None:
        return None
    try:
        return os.stat(os.path.basename(name), dir_fd=parent,
                       follow_symlinks=False)
    except OSError as e:
        if e.errno in _GONE:
            return None
        raise
    finally:
        os.close(parent)


def _set_atime(directory: int, name: bytes, ns: int) -> None:
    # os.utime() cannot leave one of the two times alone, and the guest may
    # be setting the other one just now.
    times = (_Timespec * 2)(_Timespec(*divmod(ns, 10**9)),
                            _Timespec(0, _UTIME_OMIT))
    if _libc.utimensat(directory, name, times, _AT_SYMLINK_NOFOLLOW) < 0:
        raise syscalls.oserror('utimensat', os.fsdecode(name))


def _link(root: int, upper: int, name: bytes, layer_ctime: int) -> bool:
    if _lstat(upper, name) is not None:
        # The file itself, another one in its place, or a whiteout.
        return False
    parent = _parent(root, name)
    if parent is None:
        return False
    base = os.path.basename(name)
    try:
        info = os.stat(base, dir_fd=parent, follow_symlinks=False)
        # The layer's own time of change: not copied up. Whatever is copied
        # is a new inode, so it has a later one: a layer is on disk, with all
        # that syncing takes, before the first container of it starts.
        if info.st_ctime_ns == layer_ctime or stat.S_ISDIR(info.st_mode):
            return False
        _set_atime(parent, base, info.st_atime_ns)
    except OSError as e:
        if e.errno in _GONE:
            return False
        if e.errno in errors.FULL:
            raise errors.ContainerError(
                'no_space', f'the disk of the instance is too full to link '
                f'{os.fsdecode(name)!r}', cause=str(e),
                remedy='Free some space in the instance') from e
        raise
    finally:
        os.close(parent)
    return True


def separate(
    root: int, groups: ty.Iterable[Group], links: ty.Mapping[bytes, bytes]
) -> None:
    """Remove names from the destination's directory that are hard links
    there, and not on the source. rsync makes them anew.

    :param root: a descriptor of the directory
    :param groups: the hard links there
    :param links: every name of a file with several names on the source, and
        its inode there
    """
    for group in groups:
        first = links.get(group[0])
        for name in group[1:]:
            if first is None or links.get(name) != first:
                _unlink(root, name)


def _unlink(root: int, name: bytes) -> None:
    parent = _parent(root, name)
    if parent is not None:
        try:
            os.unlink(os.path.basename(name), dir_fd=parent)
        finally:
            os.close(parent)
