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

"""Quiesced containers: they stand still while snapshots of their volumes are
made elsewhere, with all that they have written on the volumes.

A guest that stands still for somebody else's sake must not do so for ever,
whoever dies. So it goes on by itself after a time, at every change of the
container (a stop, a pause, a device), when the agent ends, and when the next
agent starts after one that was killed: ``<instance>/quiesced.json`` tells it.
For everybody who asks, the container runs.
"""

import os
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import state
from nova_pycontainer.runtime import unpack_client

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import container
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

_MARKER: ty.Final = 'quiesced.json'

Info = dict[str, ty.Any]


class Quiesces:
    """The verbs."""

    def __init__(self, owner: 'host.Host') -> None:
        self._host = owner
        # Not the container's own: who holds that may be waiting for the
        # storage.
        self._lock = threading.Lock()
        self._held: dict[
            str, tuple[container.Container, threading.Timer, float]] = {}

    def begin(self, uuid: str, limit_s: float) -> Info:
        """Let a container stand still, its files being on its disks.

        :param limit_s: seconds after which it goes on, whatever happens
        :raises ContainerError: it goes on: ``bad_state``, ``timeout``
        """
        with self._host.locked(uuid) as entry:
            entry.require('running')
            entry.check_stays()
            self._host.snapshots.check_movable(uuid)
            item = entry.container
            # Most of it while the guest runs.
            _sync(item)
            timer = threading.Timer(limit_s, self._late, (uuid, limit_s))
            timer.daemon = True
            # Before it is: the next agent has to know.
            state.write_json(item.directory / _MARKER, {
                'format': state.FORMAT,
                'process': (item.st.run or {})['process']})
            with self._lock:
                self._held[uuid] = item, timer, time.monotonic()
                item.held = True
            timer.start()
            try:
                item.cgroup.freeze(True)
                faults.point('quiesce.frozen')
                _sync(item)
            except BaseException:
                self.over(uuid)
                raise
            if not self.holds(uuid):
                raise errors.ContainerError(
                    'timeout', 'what the instance has written was not on '
                    f'its disks within {limit_s:.0f} s', uuid=uuid,
                    remedy='See whether the storage of this host is slow')
            return item.info()

    def end(self, uuid: str) -> Info:
        """Let it go on; idempotent."""
        entry = self._host.entry(uuid)
        if not self.over(uuid):
            LOG.warning('instance %s: it has gone on already', uuid)
        return entry.container.info()

    def holds(self, uuid: str) -> bool:
        """Whether a container is quiesced."""
        with self._lock:
            return uuid in self._held

    def over(self, uuid: str) -> bool:
        """Let a container go on, if it stands still.

        :returns: whether it did
        """
        with self._lock:
            found = self._held.get(uuid)
            if found is None:
                return False
            item, timer, began = found
            timer.cancel()
            item.cgroup.freeze(False)
            item.held = False
            (item.directory / _MARKER).unlink(missing_ok=True)
            del self._held[uuid]
        LOG.info('instance %s: it stood still for %.3f s for snapshots of '
                 'its volumes', uuid, time.monotonic() - began)
        return True

    def _late(self, uuid: str, limit_s: float) -> None:
        LOG.warning('instance %s: nobody has let it go on within %.0f s, '
                    'after which it does by itself', uuid, limit_s)
        try:
            self.over(uuid)
        except (OSError, errors.ContainerError) as e:
            LOG.error('instance %s: it does not go on: %s', uuid, e)

    def close(self) -> None:
        """Let all of them go on."""
        with self._lock:
            held = [*self._held]
        for uuid in held:
            self.over(uuid)

    @staticmethod
    def recover(item: 'container.Container') -> None:
        """Let a container go on that a killed agent has left."""
        marker = item.directory / _MARKER
        try:
            of = state.read_json(marker)['process']
        except FileNotFoundError:
            return
        if (item.st.run or {}).get('process') == of and (
                item.status() == 'paused'):
            LOG.warning('instance %s: it stood still when the agent ended',
                        item.uuid)
            item.cgroup.freeze(False)
        marker.unlink()


def _sync(item: 'container.Container') -> None:
    """Have all on the disks that the guest has written."""
    unpack_client.sync_filesystem(item.root)
    for volume in item.spec.volumes:
        # It may have written to the device through the host's page cache.
        fd = os.open(volume.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
