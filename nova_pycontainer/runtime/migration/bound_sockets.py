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

"""Sockets that are bound to an interface which is gone.

A DHCP client may keep one after its interface was detached: systemd-networkd
does. It hears nothing, and CRIU's dump of it fails, as the kernel cannot name
its interface (SO_BINDTODEVICE of socket(7)). Bound to the loopback interface
it hears as little.
"""

import contextlib
import errno
import socket

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import sockets

LOG = logging.getLogger(__name__)

_IFNAMSIZ = 16


def release(group: cgroup.Cgroup) -> int:
    """Bind such sockets of a container's processes elsewhere.

    :returns: how many there were
    """
    changed = 0
    seen: set[str] = set()
    for pid in group.processes():
        for link, item in sockets.of(pid):
            if link in seen:
                continue
            seen.add(link)
            with contextlib.suppress(OSError):
                if _lost(item):
                    LOG.info('%s of process %d is bound to an interface '
                             'that is gone', link, pid)
                    item.setsockopt(socket.SOL_SOCKET,
                                    socket.SO_BINDTODEVICE, b'lo\0')
                    changed += 1
    return changed


def _lost(item: socket.socket) -> bool:
    try:
        item.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _IFNAMSIZ)
    except OSError as e:
        return e.errno == errno.ENODEV
    return False
