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

"""Sockets that are bound to an address which is gone.

A socket keeps the address that it was bound to when the guest loses that,
with a detached interface or an ended lease. CRIU binds it again, which the
kernel refuses (EADDRNOTAVAIL of bind(2)). So a container that is being
restored has such addresses for as long as nothing of it runs.

Of IPv4 only: for IPv6 CRIU itself uses IP_FREEBIND.
"""

import collections.abc as cabc
import contextlib
import ipaddress
import socket
import struct

import pyroute2
from pyroute2.netlink import exceptions as nl_exceptions

from nova_pycontainer.runtime import namespaces
from nova_pycontainer.runtime import procfs

_TABLES = ('tcp', 'udp', 'udplite', 'raw', 'icmp')
_LOOPBACK = 'lo'
_LIMIT = 1024


def find(pid: int) -> list[str]:
    """The addresses that sockets are bound to and no interface has.

    :param pid: a process of the container
    """
    bound: set[ipaddress.IPv4Address] = set()
    for table in _TABLES:
        with contextlib.suppress(OSError):
            for line in procfs.lines(f'/proc/{pid}/net/{table}')[1:]:
                # In the byte order of the host.
                number = int(line.split()[1].partition(':')[0], 16)
                bound.add(ipaddress.IPv4Address(struct.pack('=I', number)))
    wanted = {a for a in bound
              if not (a.is_unspecified or a.is_loopback or a.is_multicast)}
    if not wanted:
        return []
    present = namespaces.within('net', pid, _present)
    return sorted(map(str, wanted - present))[:_LIMIT]


def _present() -> set[ipaddress.IPv4Address]:
    found = set()
    with pyroute2.IPRoute() as ipr:
        for item in ipr.get_addr(family=socket.AF_INET):
            for name in 'IFA_LOCAL', 'IFA_ADDRESS', 'IFA_BROADCAST':
                text = item.get_attr(name)
                if text:
                    found.add(ipaddress.IPv4Address(text))
    return found


def lend(pid: int, addresses: cabc.Iterable[str]) -> None:
    """Let a container that does not run yet have addresses."""
    _change(pid, addresses, 'add')


def take_back(pid: int, addresses: cabc.Iterable[str]) -> None:
    _change(pid, addresses, 'del')


def _change(pid: int, addresses: cabc.Iterable[str], what: str) -> None:
    # The peer says which, and may say only this.
    checked = [str(ipaddress.IPv4Address(a)) for a in addresses][:_LIMIT]

    def change() -> None:
        with pyroute2.IPRoute() as ipr:
            index, = ipr.link_lookup(ifname=_LOOPBACK)
            for address in checked:
                with contextlib.suppress(nl_exceptions.NetlinkError):
                    ipr.addr(what, index=index, address=address, prefixlen=32)

    if checked:
        namespaces.within('net', pid, change)
