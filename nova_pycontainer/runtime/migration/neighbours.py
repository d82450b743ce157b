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

"""The guest's neighbour tables (ARP and NDP), which CRIU does not restore.

With an empty one the first packet of every connection waits for an answer to
an ARP request. The first requests leave while the network is still held, so
their answers are lost, and the kernel asks again after a second: that second
would be added to every blackout.
"""

import collections.abc as cabc
import contextlib
import ipaddress
import re
import socket
import typing as ty

import pyroute2
from pyroute2.netlink import exceptions as nl_exceptions

from nova_pycontainer.runtime import namespaces

_LIMIT = 1024
_NUD_INCOMPLETE = 0x01
_NUD_STALE = 0x04
#: Entries that somebody has answered for: reachable, stale, delay, probe.
_NUD_KNOWN = 0x02 | 0x04 | 0x08 | 0x10
#: Set by hand: nobody is asked.
_NUD_PERMANENT = 0x80
_MAC = re.compile(r'([0-9a-f]{2}:){5}[0-9a-f]{2}')

Neighbour = dict[str, str | bool]


def save(pid: int) -> list[Neighbour]:
    """The neighbours that a container knows, of its Ethernet interfaces."""
    return namespaces.within('net', pid, _save)


def restore(pid: int, neighbours: cabc.Sequence[ty.Mapping[str, ty.Any]]
            ) -> None:
    """Let a container know them again.

    As stale ones: they are used at once, and checked soon after. Those that
    were set by hand are again.
    """
    if neighbours:
        namespaces.within('net', pid, lambda: _restore(neighbours))


def forget(pid: int) -> None:
    """Let a container that may run elsewhere soon ask nobody any more.

    The kernel itself checks who it has talked to, also for a guest that is
    frozen, and such a question would lead the switch back to where it is
    from. (Only ARP's gets through CRIU's lock of the network.) If it runs on
    here, it learns them again.
    """
    namespaces.within('net', pid, _forget)


def _forget() -> None:
    with pyroute2.IPRoute() as ipr:
        for item in ipr.get_neighbours(family=socket.AF_INET):
            if item['state'] & (_NUD_KNOWN | _NUD_INCOMPLETE):
                with contextlib.suppress(nl_exceptions.NetlinkError):
                    ipr.neigh(
                        'del', dst=item.get_attr('NDA_DST'),
                        ifindex=item['ifindex'], family=socket.AF_INET)


def _save() -> list[Neighbour]:
    found = []
    with pyroute2.IPRoute() as ipr:
        names = {link['index']: link.get_attr('IFLA_IFNAME')
                 for link in ipr.get_links()}
        for family in (socket.AF_INET, socket.AF_INET6):
            for item in ipr.get_neighbours(family=family):
                mac = item.get_attr('NDA_LLADDR')
                state = item['state']
                if state & (_NUD_KNOWN | _NUD_PERMANENT) and mac:
                    found.append({
                        'interface': names.get(item['ifindex'], ''),
                        'address': item.get_attr('NDA_DST'), 'mac': mac,
                        'permanent': bool(state & _NUD_PERMANENT)})
    return found[:_LIMIT]


def _restore(neighbours: cabc.Sequence[ty.Mapping[str, ty.Any]]) -> None:
    with pyroute2.IPRoute() as ipr:
        indexes = {link.get_attr('IFLA_IFNAME'): link['index']
                   for link in ipr.get_links()}
        for item in neighbours[:_LIMIT]:
            index = indexes.get(item['interface'])
            mac = str(item['mac'])
            if index is None or not _MAC.fullmatch(mac):
                continue
            address = ipaddress.ip_address(str(item['address']))
            try:
                ipr.neigh(
                    'replace', dst=str(address), lladdr=mac, ifindex=index,
                    state=(_NUD_PERMANENT if item.get('permanent')
                           else _NUD_STALE),
                    family=(socket.AF_INET if address.version == 4
                            else socket.AF_INET6))
            except nl_exceptions.NetlinkError:
                # An interface that the guest has taken down has none.
                continue
