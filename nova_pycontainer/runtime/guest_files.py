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

"""Files that a container's root has beside those of its image.

Their paths are the user's and the directories on the way are an image's:
every path is resolved within the root (openat2(2), RESOLVE_IN_ROOT), where a
link of the image leads to what it would lead to in the guest. Nothing of the
guest runs yet that could change a directory meanwhile.
"""

import base64
import binascii
import collections.abc as cabc
import errno
import os
import pathlib
import stat
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import syscalls

_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
#: Of files and directories that are new. libvirt's (nova.virt.disk.api) are
#: the same, but for the last directory of a path, which it makes 0744: there
#: nobody but root could read the file.
_FILE_MODE = 0o644
_DIRECTORY_MODE = 0o755
#: What another path would not meet.
_OF_THE_PATH = frozenset((
    errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ENXIO,
    errno.EPERM))


class File(ty.NamedTuple):
    """A path in the guest, and what is to be there."""

    path: str
    content: bytes

    @property
    def parts(self) -> tuple[str, ...]:
        path = pathlib.PurePosixPath(self.path)
        return path.parts[1:] if path.is_absolute() else path.parts


def parse(value: object) -> tuple[File, ...]:
    """Read the list of a specification: ``path``, and ``content`` in base64.

    :raises ContainerError: ``invalid``; ``file_refused``: no path of a file
    """
    if not isinstance(value, list | tuple):
        raise errors.ContainerError('invalid', 'files is no list')
    found = []
    for item in value:
        try:
            path, content = item['path'], item['content']
            if not isinstance(path, str):
                raise TypeError('path is no string')
            os.fsencode(path)
            file = File(path, base64.b64decode(content, validate=True))
        except (binascii.Error, ValueError, TypeError, KeyError) as e:
            raise errors.ContainerError(
                'invalid', 'this is no file for the guest',
                cause=repr(e)) from e
        if '\0' in path or path.rpartition('/')[2] in ('', '.', '..'):
            raise _refused(file, 'it is no path of a file')
        found.append(file)
    return tuple(found)


def write(root: pathlib.Path, files: cabc.Iterable[File], owner: int) -> None:
    """Write files, with the directories that they need.

    Directories and files that are new belong to ``owner``. A file that is
    there keeps its owner and mode, and has the new content.

    :param root: where the root file system is mounted
    :param owner: host id of the guest's root
    :raises ContainerError: ``file_refused``, ``no_space``; what came before
        in the list is there
    :raises OSError: what is no fault of the path's
    """
    place = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for file in files:
            try:
                _make_directories(place, file.parts[:-1], owner)
                _write(place, file, owner)
            except OSError as e:
                if e.errno in errors.FULL:
                    raise errors.ContainerError(
                        'no_space', f'there is no room for {file.path!r}',
                        cause=e.strerror,
                        remedy='Choose a flavor with a larger disk') from e
                if e.errno not in _OF_THE_PATH:
                    raise
                raise _refused(file, e.strerror or str(e)) from e
    finally:
        os.close(place)


def _refused(file: File, cause: str) -> errors.ContainerError:
    return errors.ContainerError(
        'file_refused', f'file {file.path!r} cannot be written into the '
        'image', cause=cause, remedy='Choose another path')


def _make_directories(
    root: int, parts: cabc.Sequence[str], owner: int
) -> None:
    parent = os.dup(root)
    try:
        for number, name in enumerate(parts, 1):
            # From the root each time: a link may be absolute, or lead up.
            path = '/'.join(parts[:number])
            try:
                here = _directory(root, path)
            except FileNotFoundError:
                try:
                    os.mkdir(name, _DIRECTORY_MODE, dir_fd=parent)
                except FileExistsError:
                    raise OSError(
                        errno.ENOENT, f'{path} is a link that leads nowhere'
                    ) from None
                os.chmod(name, _DIRECTORY_MODE, dir_fd=parent)
                os.chown(name, owner, owner, dir_fd=parent,
                         follow_symlinks=False)
                here = _directory(root, path)
            os.close(parent)
            parent = here
    finally:
        os.close(parent)


def _directory(root: int, path: str) -> int:
    return syscalls.openat2(
        root, path, os.O_PATH | os.O_DIRECTORY, _RESOLVE)


def _write(root: int, file: File, owner: int) -> None:
    fd, new = _open(root, '/'.join(file.parts))
    with os.fdopen(fd, 'wb') as f:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, 'it is no regular file')
        if new:
            # Whatever our umask.
            os.fchmod(fd, _FILE_MODE)
            os.fchown(fd, owner, owner)
        os.ftruncate(fd, 0)
        f.write(file.content)


def _open(root: int, path: str) -> tuple[int, bool]:
    """:returns: a descriptor, and whether the file is new"""
    # A pipe or a terminal of the image must not make this wait, nor ours.
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return syscalls.openat2(
            root, path, flags | os.O_CREAT | os.O_EXCL, _RESOLVE,
            _FILE_MODE), True
    except FileExistsError:
        pass
    try:
        return syscalls.openat2(root, path, flags, _RESOLVE), False
    except FileNotFoundError:
        # A link to a file that is not there.
        return syscalls.openat2(
            root, path, flags | os.O_CREAT, _RESOLVE, _FILE_MODE), True
