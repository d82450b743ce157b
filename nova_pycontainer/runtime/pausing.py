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

"""A guest is frozen at a moment in which it can be dumped.

What a frozen guest is in the middle of, it cannot finish before it runs again.
"""

import time

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import netlink
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import unix_sockets

#: Seconds to wait for such a moment.
_PATIENCE = 2.0
#: Seconds in which a new process executes its program.
EXEC = 0.005
#: Seconds for a guest to get over what it is in the middle of.
_STEP = 0.02


def freeze(group: cgroup.Cgroup, pid: int | None, again: bool = False) -> None:
    """Freeze a guest when it can be dumped; after two seconds, whenever.

    :param pid: of its init; None: it has ended
    :param again: it could not be dumped as it is. It is let run in any case,
        and frozen when it has read what its processes have said to each
        other: CRIU does not dump the control messages of unix(7) sockets
    :raises ContainerError: ``timeout``, as :meth:`.cgroup.Cgroup.freeze`
    """
    deadline = time.monotonic() + _PATIENCE
    if again:
        group.freeze(False)
        time.sleep(_STEP)
    group.freeze(True)
    while time.monotonic() < deadline:
        if netlink.unread(pid):
            group.freeze(False)
            netlink.wait(pid)
        elif in_vfork(group):
            group.freeze(False)
            time.sleep(EXEC)
        elif again and unix_sockets.unread(pid):
            group.freeze(False)
            unix_sockets.wait(pid)
        else:
            break
        group.freeze(True)


def in_vfork(group: cgroup.Cgroup) -> bool:
    """Whether a thread of a frozen guest waits for its child to execute a
    program (vfork(2)).

    Nothing can trace it before that: the kernel lets nobody interrupt it, and
    its child is frozen. Only there does a frozen task sleep uninterruptibly
    (``wait_for_vfork_done`` in the kernel's fork.c).
    """
    return any(map(process.uninterruptible, group.threads()))
