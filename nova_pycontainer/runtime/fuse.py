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


"""``/dev/fuse``: a guest mounts file systems by a program of its own.

That is how it has the file system of a volume without the host's kernel
parsing what a tenant has written: fuse2fs and its like read the device in the
guest. Every user of a distribution may have as much, in a user namespace. A
mount is of the user namespace in which the device was opened, and nobody
outside of that gets in, not even the host's root (the kernel's fs/fuse/dir.c,
``fuse_allow_current_process``): no process of the host waits for a guest.
"""

import os
import stat
import typing as ty

NAME: ty.Final = 'fuse'
#: Documentation/admin-guide/devices.txt in the kernel's sources.
NUMBER: ty.Final = os.makedev(10, 229)


def of_host() -> bool:
    """Whether this host has FUSE.

    The node tells, also where the kernel loads the module only when somebody
    opens it: kmod makes nodes of those that there are.
    """
    try:
        status = os.stat('/dev/fuse')
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == NUMBER
