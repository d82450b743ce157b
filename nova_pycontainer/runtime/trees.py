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

"""Trees of files that are deleted."""

import fcntl
import os
import pathlib
import shutil
import stat
import typing as ty


def remove(top: pathlib.Path) -> None:
    """Delete a tree whose content a guest made.

    shutil.rmtree is safe against links, and gives up at what the guest made
    immutable; those flags are only of this tree's inodes.
    """
    def failed(function: ty.Any, path: str, info: ty.Any) -> None:
        parent = os.path.dirname(path)
        for item in (parent, path):
            _make_mutable(item)
        function(path)

    shutil.rmtree(top, onerror=failed)


def _make_mutable(path: str) -> None:
    get, put = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode) and not stat.S_ISDIR(
                os.lstat(path).st_mode):
            return
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, get, bytes(8)), 'little')
        immutable = 0x10 | 0x20
        if flags & immutable:
            fcntl.ioctl(
                fd, put, (flags & ~immutable).to_bytes(8, 'little'))
    except OSError:
        pass
    finally:
        os.close(fd)
