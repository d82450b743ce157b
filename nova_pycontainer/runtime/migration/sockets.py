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

"""The sockets of a guest's processes, as descriptors of our own."""

import collections.abc as cabc
import contextlib
import os
import pathlib
import socket

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import clocks
from nova_pycontainer.runtime import procfs
from nova_pycontainer.runtime import syscalls

#: <linux/socket.h>
SOL_NETLINK = 270


def of(pid: int) -> cabc.Iterator[tuple[str, socket.socket]]:
    """All sockets that a process has open: what /proc calls it, and itself.

    Each is valid until the next one is asked for. Descriptors that come and
    go meanwhile are passed over, and a process that is gone has none.
    """
    for _, link, item in numbered(pid):
        yield link, item


@contextlib.contextmanager
def one(pid: int, number: int) -> cabc.Iterator[socket.socket]:
    """One of them, by its descriptor.

    :raises OSError: there is no such socket
    """
    pidfd = os.pidfd_open(pid)
    try:
        with socket.socket(
                fileno=syscalls.pidfd_getfd(pidfd, number)) as item:
            yield item
    finally:
        os.close(pidfd)


def numbered(
    pid: int, wanted: cabc.Callable[[str], bool] = lambda link: True,
) -> cabc.Iterator[tuple[int, str, socket.socket]]:
    """As :func:`of`, with the descriptor's number first.

    :param wanted: whether one is to be opened, by what /proc calls it
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            for number in os.listdir(f'/proc/{pid}/fd'):
                try:
                    link = os.readlink(f'/proc/{pid}/fd/{number}')
                    if not link.startswith('socket:') or not wanted(link):
                        continue
                    item = socket.socket(fileno=syscalls.pidfd_getfd(
                        pidfd, int(number)))
                except OSError:
                    continue
                with item:
                    yield int(number), link, item
    finally:
        os.close(pidfd)


def netlink(
    group: cgroup.Cgroup
) -> cabc.Iterator[tuple[int, int, socket.socket]]:
    """The netlink sockets of a guest that is stopped, each once.

    :returns: a process that has it, in the guest's own numbers; the
        descriptor; the socket, valid until the next one is asked for
    """
    seen: set[str] = set()
    known: dict[str, frozenset[str]] = {}
    for pid in group.processes():
        wanted = _netlink_of(pid, known)
        try:
            inner = clocks.inner_pid(pid)
        except OSError:
            continue
        for number, link, item in numbered(pid, wanted.__contains__):
            if link not in seen and item.family == socket.AF_NETLINK:
                seen.add(link)
                yield inner, number, item


def _netlink_of(pid: int, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """What /proc calls the netlink sockets that a process can have."""
    namespace = ''
    with contextlib.suppress(OSError):
        namespace = str(pathlib.Path(f'/proc/{pid}/ns/net').readlink())
        if namespace not in known:
            lines = procfs.lines(f'/proc/{pid}/net/netlink')[1:]
            known[namespace] = frozenset(
                f'socket:[{line.split()[-1]}]' for line in lines)
    return known.get(namespace, frozenset())


@contextlib.contextmanager
def netlink_one(
    pids: dict[int, int], inner: int, number: int
) -> cabc.Iterator[socket.socket]:
    """One of :func:`netlink`, of a guest that is restored.

    :param pids: of :func:`pids`
    :raises OSError: it is not there
    """
    if inner not in pids:
        raise ProcessLookupError('there is no such process')
    with one(pids[inner], number) as item:
        if item.family != socket.AF_NETLINK:
            raise OSError('it is no netlink socket')
        yield item


def pids(group: cgroup.Cgroup) -> dict[int, int]:
    """The processes of a guest: its own number for each → the host's."""
    found = {}
    for pid in group.processes():
        with contextlib.suppress(OSError):
            found[clocks.inner_pid(pid)] = pid
    return found
