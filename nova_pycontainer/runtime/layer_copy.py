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

"""What is checked of a layer that comes from another host.

The image is in no image store any more, so there is no digest of it to
compare with. rsync vouches for a true copy; what is left to know is whether it
fits, and whether it has only what a layer may have.
"""

import os
import pathlib
import stat
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import idmap


def check_size(size: int, entries: int, limits: archive.Limits) -> None:
    """:raises ContainerError: ``invalid``, ``image_too_large``"""
    for number in size, entries:
        if type(number) is not int or number < 0:
            raise errors.ContainerError(
                'invalid', 'this is not the description of a layer')
    if size > limits.bytes or entries > limits.entries:
        raise archive.too_large(
            f'the layer has {size} bytes in {entries} files, and '
            f'{limits.bytes} bytes in {limits.entries} are allowed here',
            'Raise [pycontainer]layer_max_gb or layer_max_entries')


def check_room(
    directory: pathlib.Path, size: int, limits: archive.Limits
) -> None:
    """:raises ContainerError: ``no_space``: known before anything is copied
    """
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    need = size + limits.min_free_bytes
    if need > free:
        raise errors.ContainerError(
            'no_space', f'the layer needs {need >> 20} MiB with the reserve, '
            f'and {free >> 20} MiB are free in {directory}',
            remedy='Delete unused layers or add space')


def check(root: pathlib.Path) -> None:
    """Refuse what no layer has: see :mod:`unpack` for what one may have.

    :raises ContainerError: ``invalid``
    """
    for top, directories, files in os.walk(root, onerror=_raise):
        for name in (*directories, *files, '.'):
            info = os.lstat(os.path.join(top, name))
            kind = stat.S_IFMT(info.st_mode)
            if kind in (stat.S_IFBLK, stat.S_IFCHR) or max(
                    info.st_uid, info.st_gid) >= idmap.RANGE:
                raise errors.ContainerError(
                    'invalid', f'{os.path.join(top, name)!r} cannot be a '
                    f'file of a layer', cause='it is a device' if kind in (
                        stat.S_IFBLK, stat.S_IFCHR) else
                    f'its owner is {info.st_uid}:{info.st_gid}')


def _raise(error: OSError) -> ty.NoReturn:
    raise error
