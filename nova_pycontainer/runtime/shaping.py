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

"""How fast an interface of a container may be.

A limit has to be where neither side can take it away. The guest is root of
its own end of a veth pair. The other end is the switch's: Open vSwitch removes
the queueing disciplines of its ports, and its userspace datapath reads frames
by a packet socket, before a filter of the kernel's sees them. So a limited
interface consists of two pairs, and what is between them is ours alone::

    guest: eth0 == gst…  <redirect>  swt… == tap… :switch

Each of the two ends in the middle hands what it gets to the other one, as
Kata Containers do it with a virtual machine's tap (tc-mirred(8)), and sends at
a limited rate (tc-tbf(8)): frames wait, and are dropped only when too many do,
which TCP takes better than a policer's loss.
"""

import collections.abc as cabc
import contextlib
import errno
import os
import pathlib
import typing as ty

import pyroute2
from pyroute2.netlink import exceptions as nl_exceptions
from pyroute2 import protocols

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import rate

#: Of an Ethernet frame, with two VLAN tags.
_HEADERS = 22
#: Of queueing discipline.
KIND = 'tbf'
#: Handles: the ingress one is the kernel's.
_INGRESS = 0xFFFF0000
_AVERAGE = 0x10000
_AVERAGE_CLASS = 0x10001
_PEAK = 0x20000
#: The largest frame that TCP hands to an interface, which would cut it. One
#: that is larger than the bucket is cut first.
_LARGE = 64 << 10
#: How much may wait: what is sent in 1/8 s, and at least this many large ones,
#: or of those that are cut this much. With less, TCP loses too much at a time.
_WAIT = 8
_LARGE_ONES = 4
_CUT = 128 << 10
#: What the kernel says of a kind that it does not have.
_LACKING = (errno.ENOENT, errno.EOPNOTSUPP)


class Ends(ty.NamedTuple):
    """The names of the two ends in the middle."""

    guest: str
    switch: str


def ends(devname: str) -> Ends:
    """:param devname: name of the switch's end, ``tap…``"""
    name = devname.removeprefix('tap')
    return Ends(f'gst{name}', f'swt{name}')


def add(
    ipr: pyroute2.IPRoute, devname: str, inbound: rate.Rate | None,
    outbound: rate.Rate | None, mtu: int,
) -> None:
    """Make the switch's pair, join it to the guest's, which is there, and
    limit what goes through. The caller removes what a failure leaves.

    :param inbound: to the guest
    :param outbound: from it
    :param mtu: bytes
    :raises ContainerError: ``unsupported``: not with this kernel
    """
    with _told(devname):
        names = ends(devname)
        unready = f'new{names.switch[3:]}'
        ipr.link('add', ifname=names.switch, kind='veth', mtu=mtu, peer={
            'ifname': unready, 'mtu': mtu})
        guest, switch = (
            ipr.link_lookup(ifname=name)[0] for name in names)
        for name in names:
            # Nothing of the host's own may go to a tenant's network.
            with contextlib.suppress(FileNotFoundError):
                pathlib.Path('/proc/sys/net/ipv6/conf', name,
                             'disable_ipv6').write_text('1')
        for here, there, limit in ((switch, guest, outbound),
                                   (guest, switch, inbound)):
            ipr.tc('add', 'ingress', here, _INGRESS)
            ipr.tc('add-filter', 'u32', here, parent=_INGRESS, prio=1,
                   protocol=protocols.ETH_P_ALL, target=0,
                   keys=['0x0/0x0+0'], action={
                       'kind': 'mirred', 'direction': 'egress',
                       'action': 'redirect', 'ifindex': there})
            _limit(ipr, here, limit, mtu)
        for index in (guest, switch):
            ipr.link('set', index=index, state='up')
        # One that has its name is whole.
        ipr.link('set', index=ipr.link_lookup(ifname=unready)[0],
                 ifname=devname)


def drop_waiting(
    ipr: pyroute2.IPRoute, devname: str, inbound: rate.Rate | None,
    outbound: rate.Rate | None, mtu: int,
) -> None:
    """Drop the frames that wait; parameters as of :func:`add`."""
    with _told(devname):
        names = ends(devname)
        for name, limit in ((names.switch, outbound), (names.guest, inbound)):
            found = ipr.link_lookup(ifname=name)
            if limit is None or not found:
                # The guest may have deleted its end, and this with it.
                continue
            try:
                ipr.tc('del', KIND, found[0], _AVERAGE)
            except nl_exceptions.NetlinkError as e:
                # Of one that was killed here.
                if e.code not in (errno.ENOENT, errno.EINVAL):
                    raise
            _limit(ipr, found[0], limit, mtu)


def _limit(
    ipr: pyroute2.IPRoute, index: int, limit: rate.Rate | None, mtu: int
) -> None:
    """Limit what an end sends."""
    if limit is None:
        return
    least = 2 * (mtu + _HEADERS)
    bucket = _bucket(
        limit.average, limit.burst or limit.average // 100, least)
    queue = max(limit.average // _WAIT,
                _LARGE_ONES * _LARGE if bucket > _LARGE else _CUT)
    ipr.tc('add', KIND, index, _AVERAGE, rate=limit.average, limit=queue,
           burst=bucket)
    if limit.peak is not None:
        # A second one in the place of the queue: of this kind pyroute2 tells
        # the kernel no peak rate.
        ipr.tc('add', KIND, index, _PEAK, parent=_AVERAGE_CLASS,
               rate=limit.peak, limit=queue,
               burst=_bucket(limit.peak, 0, least))


def _bucket(speed: int, size: int, least: int) -> int:
    """A bucket has to hold a frame, and what is due when a timer is late."""
    return max(size, speed // 1000, least)


@contextlib.contextmanager
def _told(devname: str) -> cabc.Iterator[None]:
    try:
        yield
    except nl_exceptions.NetlinkError as e:
        if e.code not in _LACKING:
            raise
        raise errors.ContainerError(
            'unsupported', f'this host cannot limit interfaces ({devname})',
            # Which must be short, for Nova keeps little of it.
            cause=os.strerror(e.code), remedy='Use a kernel with '
            'NET_SCH_TBF, NET_CLS_U32 and NET_ACT_MIRRED, or a flavor '
            'without quota:vif_*') from e
