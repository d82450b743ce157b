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


"""Files of ``/proc`` and ``/sys`` that show a guest its own share.

lxcfs(1) is a file system that some hosts have for their containers: who reads
its files gets the figures of the control group of his own init.

The guest has a mount of each file that is used (:data:`FILES`). They are of
the host, so that a migration or a resume makes them again from the lxcfs that
is there then: that host has to have one. Not used are

* ``proc/uptime``: the age of the init, which after a migration or a resume is
  the time since then. The clocks of the guest are its own, see
  :func:`.namespaces.user_and_time`, so that the kernel's file is right;
* ``proc/stat``: the boot that it tells (``btime``) is the host's, and what a
  guest tells the starts of processes by is both that and its own clocks.
  Where there is only cgroup v2 its figures are the host's as well.
"""

import collections.abc as cabc
import os
import pathlib
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

FSTYPE: ty.Final = 'fuse.lxcfs'
#: Below its mount, and in the same place below the guest's root.
FILES: ty.Final = (
    'proc/cpuinfo', 'proc/diskstats', 'proc/loadavg', 'proc/meminfo',
    'proc/swaps', 'sys/devices/system/cpu/online')
AUTO: ty.Final = 'auto'
NONE: ty.Final = 'none'
#: Where distributions mount it.
_DEFAULT: ty.Final = '/var/lib/lxcfs'


class Lxcfs:
    """The lxcfs of this host, if there is one.

    :param setting: :data:`AUTO`, :data:`NONE`, or where it is mounted
    """

    def __init__(self, setting: str = AUTO) -> None:
        self.directory = None if setting == NONE else pathlib.Path(
            _DEFAULT if setting == AUTO else setting)

    def files(self) -> dict[str, pathlib.Path]:
        """Those of :data:`FILES` that it has now, and where they are.

        Nothing if it is not mounted, or does not answer.
        """
        if self.directory is None or not _mounted(self.directory):
            return {}
        found = {}
        for name in FILES:
            try:
                os.stat(self.directory / name)
            except FileNotFoundError:
                # Older ones have no /sys.
                continue
            except OSError as e:
                # ENOTCONN: its process has ended.
                LOG.warning('lxcfs at %s does not work: %s',
                            self.directory, e)
                return {}
            found[name] = self.directory / name
        return found

    def require(
        self, names: cabc.Collection[str]
    ) -> dict[str, pathlib.Path]:
        """Where the files are that a guest has mounts of.

        :raises ContainerError: ``invalid``: one is none of :data:`FILES`;
            ``unsupported``: this host has no such file
        """
        for name in names:
            if name not in FILES:
                raise errors.ContainerError(
                    'invalid', f'{name!r} is not a file of lxcfs')
        found = self.files() if names else {}
        missing = [f'/{name}' for name in names if name not in found]
        if missing:
            raise errors.ContainerError(
                'unsupported', f'the guest has {", ".join(missing)} of '
                'lxcfs, which this host has not', remedy=self.remedy())
        return found

    def remedy(self) -> str:
        if self.directory is None:
            return 'Install and start lxcfs, and set [pycontainer]' \
                   'lxcfs_dir = auto'
        return f'Install and start lxcfs, with its mount at {self.directory}'


def name_of(fstype: str, root: str) -> str | None:
    """Which of :data:`FILES` a mount is of, by its line in mountinfo.

    The type alone tells, not the device: the mounts that an lxcfs leaves
    behind which has ended are of a file system that is not there any more.
    """
    name = root.removeprefix('/')
    return name if fstype == FSTYPE and name in FILES else None


def _mounted(directory: pathlib.Path) -> bool:
    """Whether it is what is mounted there, without touching it."""
    wanted = os.path.realpath(directory.parent) + f'/{directory.name}'
    top = None
    for line in procfs.lines('/proc/self/mountinfo'):
        left, _, right = line.partition(' - ')
        if procfs.unescape(left.split(' ')[4]) == wanted:
            # The last one covers the others.
            top = right.split(' ')[0]
    return top == FSTYPE
