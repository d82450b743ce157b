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

"""The lock that CRIU puts on a guest's network while it is dumped.

A CRIU that is killed leaves it, and then the guest would go on without one of
its connections. The tables are in the guest's own network namespace.
"""

import contextlib
import socket

from oslo_log import log as logging
from pyroute2.netlink import exceptions as nl_exceptions
from pyroute2.nftables import main as nftables

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import sockets
from nova_pycontainer.runtime import namespaces
from nova_pycontainer.runtime import process

LOG = logging.getLogger(__name__)

#: Of the protocol family "inet" (linux/netfilter.h).
_INET = 1
_NAME = 'CRIU-'
_OURS = 'pycontainer-block'
#: NF_DROP of linux/netfilter.h.
_DROP = 0
_TCP_REPAIR = 19


def remove(pid: int, group: cgroup.Cgroup) -> None:
    """Remove the lock, unless CRIU is still there to do it; idempotent.

    :param pid: the container's init
    """
    try:
        if process.traced(f'/proc/{pid}'):
            return
        names = namespaces.within('net', pid, _locks)
        if names:
            LOG.warning('the guest of process %d is behind the network lock '
                        '%s, which goes', pid, names)
            for each in group.processes():
                _end_repair(each)
            namespaces.within('net', pid, lambda: _remove(names))
    except (FileNotFoundError, ProcessLookupError):
        return
    except (OSError, errors.ContainerError,
            nl_exceptions.NetlinkError) as e:
        LOG.error('removing the network lock of process %d: %s', pid, e)


def block(pid: int) -> None:
    """Let nothing out of the guest; :func:`remove` takes it back.

    For a guest that runs on another host, or may yet do so: what its sockets
    send here, which they do without any process, would lead their peers to
    this host.

    :param pid: the container's init
    """
    try:
        namespaces.within('net', pid, _block)
    except (OSError, errors.ContainerError,
            nl_exceptions.NetlinkError) as e:
        LOG.error('blocking the network of process %d: %s', pid, e)


def unblock(pid: int) -> None:
    """The reverse of :func:`block`; idempotent.

    :param pid: the container's init
    """
    try:
        namespaces.within('net', pid, lambda: _remove(
            [name for name in _locks() if name == _OURS]))
    except (OSError, errors.ContainerError,
            nl_exceptions.NetlinkError) as e:
        LOG.error('unblocking the network of process %d: %s', pid, e)


def _block() -> None:
    with nftables.NFTables(nfgen_family=_INET) as nft:
        nft.table('add', name=_OURS)
        nft.chain('add', table=_OURS, name='output', hook='output',
                  type='filter', policy=_DROP)


def _end_repair(pid: int) -> None:
    """Let the sockets of a process send again.

    CRIU reads what they have in flight in a mode in which they keep silent
    (TCP_REPAIR of tcp(7)).
    """
    for _, sock in sockets.of(pid):
        with contextlib.suppress(OSError):
            if sock.type == socket.SOCK_STREAM and sock.family in (
                    socket.AF_INET, socket.AF_INET6) and sock.getsockopt(
                        socket.IPPROTO_TCP, _TCP_REPAIR):
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)


def _locks() -> list[str]:
    with nftables.NFTables(nfgen_family=_INET) as nft:
        names = [str(table.get_attr('NFTA_TABLE_NAME'))
                 for table in nft.get_tables()]
    return [name for name in names
            if name.startswith(_NAME) or name == _OURS]


def _remove(names: list[str]) -> None:
    with nftables.NFTables(nfgen_family=_INET) as nft:
        for name in names:
            nft.table('del', name=name)
