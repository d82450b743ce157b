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

"""Options of netlink sockets, which CRIU does not keep.

systemd takes a message for a multicast by what NETLINK_PKTINFO of netlink(7)
adds to it. Without that option it hears of no interface any more that comes
or goes after a restore.
"""

import collections.abc as cabc
import socket
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import sockets

LOG = logging.getLogger(__name__)

#: <linux/netlink.h>: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID,
#: CAP_ACK, EXT_ACK, GET_STRICT_CHK.
_OPTIONS: ty.Final = (3, 4, 5, 8, 10, 11, 12)

#: Process in the guest's own numbers, descriptor, options that are on.
Saved = list[tuple[int, int, list[int]]]


def save(group: cgroup.Cgroup) -> Saved:
    """Look at all of a guest that is stopped."""
    found: Saved = []
    for inner, number, item in sockets.netlink(group):
        options = [option for option in _OPTIONS if _is_on(item, option)]
        if options:
            found.append((inner, number, options))
    return found


def _is_on(item: socket.socket, option: int) -> bool:
    try:
        return bool(item.getsockopt(sockets.SOL_NETLINK, option))
    except OSError:
        # An option that this kernel does not have.
        return False


def restore(
    group: cgroup.Cgroup, saved: cabc.Iterable[ty.Any]
) -> None:
    """Set them again, before anything runs."""
    wanted = [(int(pid), int(number), [int(o) for o in options])
              for pid, number, options in saved]
    if not wanted:
        return
    pids = sockets.pids(group)
    for inner, number, options in wanted:
        try:
            with sockets.netlink_one(pids, inner, number) as item:
                for option in options:
                    if option in _OPTIONS:
                        item.setsockopt(sockets.SOL_NETLINK, option, 1)
        except OSError as e:
            LOG.warning('descriptor %d of process %d of the guest: its '
                        'netlink options are lost: %s', number, inner, e)
