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

"""The moment of the dump: what is noted on the source that CRIU does not.

The destination needs it for :mod:`.patches` and :mod:`.clocks`.
"""

import pathlib
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import bound_sockets
from nova_pycontainer.runtime.migration import clocks
from nova_pycontainer.runtime.migration import dentries
from nova_pycontainer.runtime.migration import netlink_options
from nova_pycontainer.runtime.migration import overruns
from nova_pycontainer.runtime.migration import patches
from nova_pycontainer.runtime.migration import resume
from nova_pycontainer.runtime.migration import sleepers
from nova_pycontainer.runtime.migration import terminals
from nova_pycontainer.runtime import netlink
from nova_pycontainer.runtime import pausing

LOG = logging.getLogger(__name__)

#: Attempts in which a guest may read what it was told.
_READS = 2


class Moment:
    """One container's, for all attempts of one migration.

    :param unread: the container's note for :mod:`.overruns`
    :ivar drops: whether messages that nobody reads may be dropped: whoever
        restores the guest tells it
    """

    def __init__(self, group: cgroup.Cgroup, root: pathlib.Path,
                 unread: pathlib.Path) -> None:
        self._group = group
        self._root = root
        self._unread = unread
        self._names = dentries.Held()
        self._sleepers = sleepers.Sleepers(group)
        self._facts: dict[str, ty.Any] = {}
        self._attempts = 0
        self.drops = False

    def before(self, init: int, paused: bool) -> None:
        """The guest still runs, or is paused, and will be dumped next."""
        self._attempts += 1
        terminals.release(self._group, paused)
        bound_sockets.release(self._group)
        self._names.hold(self._group, self._root)
        self._sleepers.look(paused)
        # The last one: the next message may come at any time.
        if paused:
            # The kernel tells it of its network while it cannot read.
            pausing.freeze(self._group, init, self._attempts > 1)
        else:
            netlink.wait(init)

    def frozen(self, init: int) -> None:
        """CRIU has stopped all and not yet run code of its own in it."""
        ahead = clocks.offsets(init)
        dropped: overruns.Dropped = []
        if self.drops and self._attempts > _READS:
            dropped = overruns.drop(self._group, init, self._unread)
        self._facts = {
            'asleep': self._sleepers.frozen(ahead[time.CLOCK_MONOTONIC]),
            'timers': clocks.save(ahead, self._group),
            'netlink': netlink_options.save(self._group),
            'dropped': dropped,
        }

    def given_up(self, init: int) -> None:
        """The guest is to go on here. It is frozen, and not traced.

        Never raises.
        """
        try:
            self._names.close()
            self.go_on(init)
        except Exception:
            # Whatever it is, the guest must not stay frozen for it. It may
            # as well have ended.
            LOG.warning('process %d: what slept in it', init, exc_info=True)

    def before_round(self) -> None:
        """The guest still runs; see :mod:`.standstill`."""
        self._sleepers.look()

    def in_round(self, init: int) -> list[str]:
        """The guest is frozen, and not traced.

        What has begun to sleep since the look is noted as well: in a dump the
        destination finds it in the images, and here nobody would.

        :returns: directories of the threads that sleep
        """
        self._sleepers.frozen(
            clocks.offsets(init)[time.CLOCK_MONOTONIC],
            time.clock_gettime_ns(time.CLOCK_MONOTONIC))
        return [thread for thread, *_ in self._sleepers.stopped]

    def go_on(self, init: int) -> None:
        """Let those sleep on that did so when the guest was frozen."""
        now = (time.clock_gettime_ns(time.CLOCK_MONOTONIC) +
               clocks.offsets(init)[time.CLOCK_MONOTONIC])
        resume.resume(
            [resume.Sleep(*s) for s in self._sleepers.stopped], now, init)
        self._sleepers.stopped = []

    def dumped(self) -> dict[str, ty.Any]:
        """All is dumped, and stopped still.

        :returns: the facts, for the destination
        """
        self._names.close()
        return {**self._facts, 'signals': patches.pending(self._group),
                'terminals': [
                    [index, *ids] for index, ids
                    in terminals.sessions(self._group).items()]}
