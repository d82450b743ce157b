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

"""Messages of the kernel that a guest has not read.

CRIU dumps no netlink socket with unread messages, and nobody can put a message
of the kernel into a new one. A guest that boots may have such a socket for
minutes: systemd holds one for a service that waits for another.

The kernel itself drops messages when a socket has no room for them, and tells
the owner so: it gets ENOBUFS, and asks for the state anew (netlink(7)). So
what is unread is dropped here, and then the owner is told in that way,
wherever the guest goes on: with too little room in the socket, and more
messages. Of rtnetlink's notifications only; whoever waits for an answer to a
request reads it soon, and the dump is tried again.

Whom to tell is written down before anything is dropped, for the agent that
comes after one that is killed between the two.
"""

import collections.abc as cabc
import contextlib
import functools
import os
import pathlib
import select
import socket
import struct
import typing as ty

from oslo_log import log as logging
import pyroute2

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import sockets
from nova_pycontainer.runtime import namespaces
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import state

LOG = logging.getLogger(__name__)

#: <linux/netlink.h>, <asm-generic/socket.h>
_LIST_MEMBERSHIPS = 9
_SO_PROTOCOL = 38
_SO_RCVBUFFORCE = 33
_ROUTE = 0
#: Of any protocol.
_MOST_GROUPS = 1024
#: More than the kernel lets one socket have (net.core.rmem_max).
_MOST_MESSAGES = 1 << 16
#: <linux/rtnetlink.h>: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE,
#: which :func:`_notify` causes messages of.
_GROUPS = 0x1 | 0x10 | 0x40
#: One takes about as much as the least room that a socket can have.
_NOTICES = 16
_LOOPBACK = 'lo'
#: On the loopback interface for a moment.
_ADDRESS = '127.255.255.253'

#: Process in the guest's own numbers, descriptor.
Dropped = list[tuple[int, int]]


def drop(group: cgroup.Cgroup, init: int, note: pathlib.Path) -> Dropped:
    """Drop what is unread, in a guest that is stopped.

    :param note: file for :func:`tell_noted`, should it go on here
    :returns: whom to :func:`tell`, should it go on elsewhere
    """
    found = [(inner, number) for inner, number, item in sockets.netlink(group)
             if _has_events(item) and _listens(item)]
    if found:
        state.write_json(note, {
            'format': state.FORMAT,
            'init': process.ProcessId.of(init).to_dict(),
            'dropped': found})
    for inner, number, item in sockets.netlink(group):
        if (inner, number) in found:
            _read_all(item)
    return found


def _has_events(item: socket.socket) -> int:
    poller = select.poll()
    poller.register(item, select.POLLIN | select.POLLERR)
    return sum(event for _, event in poller.poll(0))


def _listens(item: socket.socket) -> bool:
    try:
        if item.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) != _ROUTE:
            return False
        groups, = struct.unpack_from('=I', item.getsockopt(
            sockets.SOL_NETLINK, _LIST_MEMBERSHIPS, _MOST_GROUPS // 8))
    except (OSError, struct.error):
        return False
    return bool(groups & _GROUPS)


def _read_all(item: socket.socket) -> None:
    for _ in range(_MOST_MESSAGES):
        try:
            item.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        except OSError:
            # It has been told already, and now we have been.
            continue
    # Where more has come meanwhile, CRIU says so.


def tell_noted(group: cgroup.Cgroup, note: pathlib.Path) -> None:
    """Like :func:`tell`, of what was dropped for a dump that is of no use.
    """
    try:
        noted = state.read_json(note)
        init = process.ProcessId.from_dict(noted['init']).open()
        # What was restored instead was told then.
        if init is not None:
            os.close(init)
            tell(group, noted['dropped'])
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, errors.ContainerError) as e:
        LOG.warning('%s: whom to tell of messages that it has missed is not '
                    'known: %s', note, e)
    with contextlib.suppress(OSError):
        note.unlink()


def tell(group: cgroup.Cgroup, dropped: cabc.Iterable[ty.Any]) -> None:
    """Let owners of sockets know, in a guest that does not run yet."""
    wanted = [(int(pid), int(number)) for pid, number in dropped]
    if not wanted:
        return
    pids = sockets.pids(group)
    for inner, number in wanted:
        try:
            with sockets.netlink_one(pids, inner, number) as item:
                namespaces.within(
                    'net', pids[inner], functools.partial(_overrun, item))
        except (OSError, errors.ContainerError,
                pyroute2.NetlinkError) as e:
            LOG.warning('descriptor %d of process %d of the guest: that it '
                        'has missed messages cannot be told: %s', number,
                        inner, e)


def _overrun(item: socket.socket) -> None:
    """:raises OSError: its owner does not want to know, or cannot be told"""
    room = item.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    item.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    try:
        with pyroute2.IPRoute() as ipr:
            for _ in range(_NOTICES):
                if _has_events(item) & select.POLLERR:
                    return
                _notify(ipr)
        raise OSError('it is not overrun')
    finally:
        # The kernel doubles what it is given, socket(7).
        item.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, room // 2)


def _notify(ipr: pyroute2.IPRoute) -> None:
    link, = ipr.link('get', ifname=_LOOPBACK)
    # Set to what it is, and told to all who listen.
    ipr.link('set', index=link['index'],
             ifalias=link.get_attr('IFLA_IFALIAS') or '')
    for verb in ('add', 'del'):
        ipr.addr(verb, index=link['index'], address=_ADDRESS, prefixlen=32)
