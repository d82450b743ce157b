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

"""Tell the network where a container's addresses are now.

Sent from the container's end of each veth pair right after it runs on a new
host. The RARP frame is what QEMU sends: OVN passes no traffic of a migrated
port on the new host before it has seen one
(``options:activation-strategy=rarp`` of ovn-nb(5)). Gratuitous ARP (RFC 5227)
and unsolicited neighbour advertisements (RFC 4861, 7.2.6) make switches and
neighbours outside of OVN learn.
"""

import collections.abc as cabc
import contextlib
import ipaddress
import socket
import struct

from oslo_log import log as logging
import pyroute2
from pyroute2.netlink import exceptions as nl_exceptions

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import namespaces
from nova_pycontainer.runtime import network

LOG = logging.getLogger(__name__)

_ETH_P_ARP = 0x0806
_ETH_P_RARP = 0x8035
_ETH_P_IPV6 = 0x86DD
_BROADCAST = b'\xff' * 6
_ALL_NODES = bytes.fromhex('333300000001')


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b'\0'
    total = sum(struct.unpack(f'!{len(data) // 2}H', data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def rarp(mac: bytes) -> bytes:
    """A RARP request about oneself, RFC 903, as QEMU announces a guest."""
    return (_BROADCAST + mac + struct.pack(
        '!HHHBBH', _ETH_P_RARP, 1, 0x0800, 6, 4, 3) +
        mac + bytes(4) + mac + bytes(4)).ljust(60, b'\0')


def gratuitous_arp(mac: bytes, address: ipaddress.IPv4Address) -> bytes:
    return (_BROADCAST + mac + struct.pack(
        '!HHHBBH', _ETH_P_ARP, 1, 0x0800, 6, 4, 1) +
        mac + address.packed + bytes(6) + address.packed).ljust(60, b'\0')


def unsolicited_na(mac: bytes, address: ipaddress.IPv6Address) -> bytes:
    target = ipaddress.IPv6Address('ff02::1').packed
    # Override flag set; target link-layer address option.
    body = struct.pack('!BBHI', 136, 0, 0, 0x20000000) + address.packed + (
        b'\x02\x01' + mac)
    pseudo = address.packed + target + struct.pack(
        '!IHBB', len(body), 0, 0, 58)
    checksum = _checksum(pseudo + body)
    body = body[:2] + struct.pack('!H', checksum) + body[4:]
    header = struct.pack(
        '!IHBB', 0x60000000, len(body), 58, 255) + address.packed + target
    return (_ALL_NODES + mac + struct.pack('!H', _ETH_P_IPV6) + header + body)


def _frames(
    mac: bytes, addresses: cabc.Iterable[str]
) -> cabc.Iterator[bytes]:
    yield rarp(mac)
    for text in addresses:
        address = ipaddress.ip_address(text)
        if isinstance(address, ipaddress.IPv4Address):
            yield gratuitous_arp(mac, address)
        else:
            yield unsolicited_na(mac, address)


def announce(item: container.Container, pid: int) -> None:
    """Announce all addresses of a container's interfaces, once.

    A failure is logged: the guest's own traffic tells the same later.

    :param pid: a process of the container
    """
    try:
        names = network.names_inside(item.spec.nics, pid)
        namespaces.within('net', pid, lambda: _announce(names.values()))
    except (OSError, errors.ContainerError,
            nl_exceptions.NetlinkError) as e:
        LOG.warning('instance %s: announcing its addresses: %s', item.uuid,
                    e)


def _announce(interfaces: cabc.Collection[str]) -> int:
    sent = 0
    with pyroute2.IPRoute() as ipr:
        links = {
            link['index']: (link.get_attr('IFLA_IFNAME'),
                            link.get_attr('IFLA_ADDRESS'))
            for link in ipr.get_links()
            if link.get_attr('IFLA_IFNAME') in interfaces}
        addresses: dict[int, list[str]] = {index: [] for index in links}
        for item in ipr.get_addr():
            if item['index'] in addresses:
                addresses[item['index']].append(item.get_attr('IFA_ADDRESS'))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        for index, (name, mac) in links.items():
            # The guest may have taken an interface down; the others count.
            with contextlib.suppress(OSError):
                sock.bind((name, 0))
                for frame in _frames(
                        bytes.fromhex(mac.replace(':', '')),
                        addresses[index]):
                    sock.send(frame)
                    sent += 1
    return sent
