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

"""What the processes of a guest have said to each other.

By sock_diag(7) in its network namespace, which unix(7) sockets belong to.
"""

import socket
import time
import typing as ty

import pyroute2
from pyroute2.netlink import diag

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import namespaces

#: Seconds to wait for a guest to read.
_QUIET = 0.5
#: <net/tcp_states.h>: what is in its queue is whoever wants to connect.
_LISTEN: ty.Final = 10


def unread(pid: int | None) -> bool:
    """Whether a socket of a process's network namespace has something that
    was not read yet.

    :param pid: None: it has ended
    """
    if pid is None:
        return False
    try:
        return namespaces.within('net', pid, _unread)
    except (OSError, errors.ContainerError, pyroute2.NetlinkError):
        return False


def _unread() -> bool:
    with pyroute2.DiagSocket() as sock:
        sock.bind()
        return any(
            item['udiag_state'] != _LISTEN and
            (item.get_attr('UNIX_DIAG_RQLEN') or {}).get('udiag_rqueue')
            for item in sock.get_sock_stats(
                family=socket.AF_UNIX, show=diag.UDIAG_SHOW_RQLEN))


def wait(pid: int | None) -> None:
    """Let a guest that runs read; nothing is lost if it does not."""
    deadline = time.monotonic() + _QUIET
    while unread(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
