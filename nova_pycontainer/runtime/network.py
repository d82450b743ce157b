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

"""A container's network interfaces: veth pairs.

The *outer* end carries the name that Nova gives to the VIF and is what os-vif
plugs into the integration bridge. The *inner* end is *parked* in the host's
network namespace until the container's own namespace exists, then moved into
it as eth0, eth1 … before the init runs. Neutron can so see the port up long
before there is a container; and CRIU can restore into the same parked end.

The container makes its own network namespace (CRIU refuses to restore a
foreign one together with a user namespace), so a pair dies with its
container, and is made again for the next start.

An interface with a limit has a second pair between the two ends, see
:mod:`.shaping`.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import errno
import itertools
import os
import re
import socket
import typing as ty

import pyroute2
from pyroute2.netlink import exceptions as nl_exceptions

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import namespaces
from nova_pycontainer.runtime import rate
from nova_pycontainer.runtime import shaping

_MAC = re.compile(r'^([0-9a-f]{2}:){5}[0-9a-f]{2}$')
_OUTER = re.compile(r'^tap[A-Za-z0-9-]{1,11}$')
#: Handle 1: of a root queueing discipline.
_HOLD = 0x10000
_NAME = re.compile(r'^[A-Za-z0-9._-]{1,15}$')
_INSIDE = re.compile(r'[A-Za-z0-9._@+-]{1,15}')


@dataclasses.dataclass(frozen=True)
class Nic:
    """One interface of a container.

    :param id: the Neutron port's uuid
    :param devname: name of the outer end
    :param mac: address of the inner end
    :param mtu: bytes, of both ends
    :param tx_offload: False switches transmit offloads of the inner end off:
        a userspace datapath gets frames with unfinished checksums otherwise,
        and TCP hangs while ping works (neutron bug 1832021)
    :param inbound: limit of what goes to the guest
    :param outbound: limit of what comes from it
    """

    id: str
    devname: str
    mac: str
    mtu: int
    tx_offload: bool = True
    inbound: rate.Rate | None = None
    outbound: rate.Rate | None = None

    @property
    def parked_name(self) -> str:
        """Name of the inner end while it is on the host."""
        return 'nic' + self.id[:11]

    @property
    def limited(self) -> bool:
        return self.inbound is not None or self.outbound is not None

    @property
    def peer_name(self) -> str:
        """Name of the end that the inner one is joined to."""
        return (shaping.ends(self.devname).guest if self.limited
                else self.devname)

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'Nic':
        """:raises ContainerError: ``invalid``"""
        try:
            nic = cls(
                id=str(data['id']), devname=str(data['devname']),
                mac=str(data['mac']).lower(), mtu=int(data['mtu']),
                tx_offload=bool(data.get('tx_offload', True)),
                inbound=rate.Rate.from_dict(data.get('inbound')),
                outbound=rate.Rate.from_dict(data.get('outbound')))
        except (KeyError, TypeError, ValueError) as e:
            raise errors.ContainerError(
                'invalid', f'a network interface is not well described: {e}',
            ) from e
        if not (_MAC.match(nic.mac) and _OUTER.match(nic.devname) and
                _NAME.match(nic.parked_name) and 68 <= nic.mtu <= 65535):
            raise errors.ContainerError(
                'invalid', f'a network interface is not valid: {data}')
        return nic

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


def check_devname(name: object) -> str:
    """Return the name of an outer end, as Nova makes them.

    :raises ContainerError: ``invalid``: no other link of the host may be
        touched through the agent
    """
    if not isinstance(name, str) or not _OUTER.fullmatch(name):
        raise errors.ContainerError(
            'invalid', f'{name!r} is not the name of an instance\'s interface')
    return name


@contextlib.contextmanager
def _netlink(what: str) -> cabc.Iterator[pyroute2.IPRoute]:
    try:
        with pyroute2.IPRoute() as ipr:
            yield ipr
    except nl_exceptions.NetlinkError as e:
        raise errors.ContainerError(
            'network', f'{what} failed', cause=str(e)) from e


def _index(ipr: pyroute2.IPRoute, name: str) -> int | None:
    found = ipr.link_lookup(ifname=name)
    return found[0] if found else None


def exists(nic: Nic) -> bool:
    with _netlink(f'looking for {nic.devname}') as ipr:
        return _index(ipr, nic.devname) is not None


def plug(nic: Nic) -> bool:
    """Make the interface, with the inner end parked, unless it exists.

    :returns: whether one was made
    :raises ContainerError: ``network``; ``unsupported``: it has a limit, and
        this host cannot
    """
    with _netlink(f'making the interface {nic.devname}') as ipr:
        if _index(ipr, nic.devname) is not None:
            return False
        # A half of one, made or removed, that a kill has left.
        _remove(ipr, nic.devname)
        ipr.link('add', ifname=nic.peer_name, kind='veth', mtu=nic.mtu, peer={
            'ifname': nic.parked_name, 'address': nic.mac, 'mtu': nic.mtu})
        try:
            if not nic.tx_offload:
                _tx_offload_off(nic.parked_name)
            if nic.limited:
                shaping.add(
                    ipr, nic.devname, nic.inbound, nic.outbound, nic.mtu)
            ipr.link('set', index=_index(ipr, nic.devname), state='up')
        except BaseException:
            _remove(ipr, nic.devname)
            raise
    return True


def check_limits() -> None:
    """Whether interfaces can have limits on this host.

    One is made, in a namespace that nobody else has.

    :raises ContainerError: ``unsupported``, ``network``
    """
    limit = rate.Rate(1_000_000, 2_000_000)
    namespaces.in_new('net', lambda: plug(Nic(
        'check', 'tap-check', '02:00:00:00:00:01', 1500, inbound=limit,
        outbound=limit)))


def _tx_offload_off(name: str) -> None:
    with contextlib.closing(pyroute2.Ethtool()) as tool:
        features = tool.get_features(name)
        for key, feature in features.features.items():
            # Segmentation offloads need the checksum's, so the kernel
            # switches them off along with it.
            if key.startswith('tx-checksum') and feature.available:
                feature.enable = False
        tool.set_features(name, features)


def move_in(nic: Nic, pid: int, name: str) -> None:
    """Move the parked inner end into the namespace of a container's process.

    One message renames and moves, so no other interface of the host can take
    the name in between.

    :param name: what it is called there
    :raises ContainerError: ``network``
    """
    with _netlink(f'moving {nic.devname} into the container') as ipr:
        index = _index(ipr, nic.parked_name)
        if index is None:
            raise errors.ContainerError(
                'network', f'the inner end of {nic.devname} is not here',
                remedy='Power the instance off and on again')
        netns_fd = os.open(
            f'/proc/{pid}/ns/net', os.O_RDONLY | os.O_CLOEXEC)
        try:
            ipr.link('set', index=index, net_ns_fd=netns_fd, ifname=name,
                     address=nic.mac)
        finally:
            os.close(netns_fd)


def names_inside(nics: cabc.Iterable[Nic], pid: int) -> dict[str, str]:
    """What the guest calls its interfaces: port's id → name.

    It may have renamed one. One that is not there, it has deleted.

    :raises ContainerError: ``unsupported``: see :func:`check_name_inside`
    """
    indices = {}
    with _netlink('looking for the interfaces of the container') as ipr:
        for nic in nics:
            index = _index(ipr, nic.peer_name)
            if index is not None:
                link, = ipr.get_links(index)
                indices[nic.id] = link.get_attr('IFLA_LINK')
    names = namespaces.within('net', pid, lambda: dict(socket.if_nameindex()))
    found = {ident: names[index] for ident, index in indices.items()
             if index in names}
    for name in found.values():
        check_name_inside(name)
    return found


def check_name_inside(name: object) -> str:
    """:raises ContainerError: ``unsupported``: CRIU would misread it"""
    if not isinstance(name, str) or not _INSIDE.fullmatch(name):
        raise errors.ContainerError(
            'unsupported', f'the network interface {name!r} of the guest '
            'has a name that CRIU cannot restore',
            remedy='Rename it in the guest')
    return name


def free_name(pid: int) -> str:
    """The first ``eth<number>`` that the guest does not have."""
    taken = namespaces.within(
        'net', pid, lambda: {name for _, name in socket.if_nameindex()})
    return next(name for n in itertools.count()
                if (name := f'eth{n}') not in taken)


def hold(nic: Nic, on: bool) -> None:
    """Keep frames from the guest, or let them pass again; idempotent.

    By a queue of no length at the outer end, so that the link stays as it is:
    taking it down would cost a second, since the kernel tells carriers no
    more than once in a second (net/core/link_watch.c). What waits for its turn
    beyond it, either way, is dropped.
    """
    with _netlink(f'holding {nic.devname}') as ipr:
        index = _index(ipr, nic.devname)
        if index is None:
            return
        try:
            if on:
                ipr.tc('add', 'pfifo', index, handle=_HOLD, limit=0)
            else:
                ipr.tc('del', 'pfifo', index, handle=_HOLD)
        except nl_exceptions.NetlinkError as e:
            if e.code not in (errno.EEXIST if on else errno.ENOENT,
                              errno.EINVAL):
                raise
        if on and nic.limited:
            shaping.drop_waiting(
                ipr, nic.devname, nic.inbound, nic.outbound, nic.mtu)


def parked(nic: Nic) -> bool:
    with _netlink(f'looking for {nic.parked_name}') as ipr:
        return _index(ipr, nic.parked_name) is not None


def unplug(devname: str) -> None:
    """Remove an interface by its outer end; idempotent."""
    with _netlink(f'removing {devname}') as ipr:
        _remove(ipr, devname)


def _remove(ipr: pyroute2.IPRoute, devname: str) -> None:
    # The outer end last, as its peer or itself: it is what is looked for.
    for name in (*shaping.ends(devname), devname):
        _delete(ipr, name)


def _delete(ipr: pyroute2.IPRoute, devname: str) -> None:
    index = _index(ipr, devname)
    if index is None:
        return
    try:
        ipr.link('del', index=index)
    except nl_exceptions.NetlinkError as e:
        if e.code != errno.ENODEV:
            raise


def statistics(nic: Nic) -> dict[str, int] | None:
    """Counters as the guest sees them, or None while there is no pair.

    Read at the outer end, whose receive is the guest's transmit: nothing of
    ours needs to enter the guest's namespace.
    """
    base = f'/sys/class/net/{nic.devname}/statistics'
    names = {
        'rx_octets': 'tx_bytes', 'rx_packets': 'tx_packets',
        'rx_drop': 'tx_dropped', 'rx_errors': 'tx_errors',
        'tx_octets': 'rx_bytes', 'tx_packets': 'rx_packets',
        'tx_drop': 'rx_dropped', 'tx_errors': 'rx_errors',
    }
    result = {}
    try:
        for ours, theirs in names.items():
            with open(os.path.join(base, theirs)) as f:
                result[ours] = int(f.read())
    except OSError as e:
        # Of a device that is on its way out, net/core/net-sysfs.c says
        # EINVAL.
        if e.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
            raise
        return None
    return result
