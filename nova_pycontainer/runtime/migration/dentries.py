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

"""Watched files whose names the kernel has forgotten.

CRIU restores an inotify watch by the file's name, which it finds by a handle
that the kernel shows in /proc/PID/fdinfo. After memory pressure the name is
gone from the cache, and so is the handle: the dump fails ("Can't dump that
handle"). Looking the file up once brings it back, and an open file keeps it.
"""

import collections.abc as cabc
import contextlib
import os
import pathlib
import re

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

_LINK = 'anon_inode:inotify'
_WATCH = re.compile(
    r'^inotify wd:\S+ ino:([0-9a-f]+) sdev:([0-9a-f]+)(.*)$', re.M)
#: Looking up takes a tenth of a second in an ordinary system.
_MAX_ENTRIES = 2_000_000


class Held:
    """Keeps names in the cache until it is closed."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Idempotent."""
        self._stack.close()

    def hold(self, group: cgroup.Cgroup, root: pathlib.Path) -> int:
        """Look up what is watched in a container that runs.

        :param root: the host's mount of the container's root
        :returns: how many watched files had no name
        """
        self.close()
        # systemd watches these of every unit.
        for directory, _, _ in os.walk(group.v2):
            self._open(os.path.join(directory, 'cgroup.events'))
        forgotten = _forgotten(group)
        if forgotten:
            self._find(root, forgotten)
        return len(forgotten)

    def _open(self, path: str) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)

    def _find(self, root: pathlib.Path, inodes: cabc.Set[int]) -> None:
        """Numbers may mean files of other file systems; no harm is done."""
        wanted = set(inodes)
        budget = _MAX_ENTRIES
        device = os.stat(root).st_dev
        directories = [str(root)]
        if os.stat(root).st_ino in wanted:
            self._open(str(root))
        while directories and budget > 0:
            # Nothing is followed: the guest chooses what lies there.
            with contextlib.suppress(OSError), os.scandir(
                    directories.pop()) as entries:
                for entry in entries:
                    budget -= 1
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    if entry.is_dir(follow_symlinks=False) and (
                            status.st_dev == device):
                        directories.append(entry.path)
                    if status.st_ino in wanted:
                        self._open(entry.path)
        if budget <= 0:
            LOG.warning('%s has too many files to look up the watched ones',
                        root)


def _forgotten(group: cgroup.Cgroup) -> set[int]:
    """Inode numbers of watched files that have no handle."""
    found = set()
    for pid in group.processes():
        directory = f'/proc/{pid}/fd'
        with contextlib.suppress(OSError):
            for number in os.listdir(directory):
                with contextlib.suppress(OSError):
                    if os.readlink(f'{directory}/{number}') != _LINK:
                        continue
                    text = procfs.text(f'/proc/{pid}/fdinfo/{number}')
                    for inode, _, rest in _WATCH.findall(text):
                        if 'f_handle:' not in rest:
                            found.add(int(inode, 16))
    return found
