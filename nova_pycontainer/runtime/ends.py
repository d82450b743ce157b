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

"""Containers whose init has ended."""

import contextlib
import os
import signal
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import entries
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import events
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import state

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

#: A guest that reboots sooner than this after its start waits for the rest:
#: one that never comes up must not spin.
_MIN_UPTIME = 2.0


class Ends:
    """Cleans up, and starts again who asked for a reboot."""

    def __init__(self, owner: 'host.Host', log: events.EventLog) -> None:
        self._host = owner
        self._events = log

    def exited(self, uuid: str) -> None:
        """The watcher has seen the end of an init."""
        try:
            self._end_migration(self._host.entry(uuid))
            with self._host.locked(uuid) as entry:
                if self.finish(entry):
                    self._reboot_by_guest(entry)
        except errors.ContainerError as e:
            if e.code not in ('bad_state', 'not_found'):
                raise

    @staticmethod
    def _end_migration(entry: entries.Entry) -> None:
        """There is nothing left to be moved, and a reboot does not wait for
        the end of a copy.
        """
        migration = entry.migration
        if migration is None or migration.progress.role != 'source' or (
                migration.committed):
            return
        with contextlib.suppress(errors.ContainerError):
            migration.abort('its init has ended')

    def finish(self, entry: entries.Entry) -> bool:
        """Clean up after an ended container; idempotent.

        :returns: whether the guest asked for a reboot
        """
        item = entry.container
        run = item.st.run
        if run is None:
            # Dealt with already. Tearing down once more would take away what
            # the next start may have made in the meantime.
            return False
        pidfd = item.open()
        if pidfd is not None:
            try:
                if not process.exited(pidfd):
                    return False
            finally:
                os.close(pidfd)
        same_boot = run['process']['boot_id'] == process.boot_id()
        ended = item.read_exit() if same_boot else state.Exit()
        self._host.snapshots.release(item.uuid)
        item.teardown()
        # reboot(2) in a PID namespace: the kernel kills its init by SIGHUP
        # for a restart, by SIGINT for halt and power off.
        again = (ended.signal == signal.SIGHUP and not entry.stopping and
                 run['started_at'] is not None)
        entry.rebooting = again
        item.st.run, item.st.exit = None, ended
        try:
            item.st.save(item.directory)
        except OSError as e:
            # A full disk, such as one may just be freeing. What could not be
            # written down is found out again.
            LOG.error('instance %s: its end cannot be written down: %s',
                      item.uuid, e)
        LOG.info('instance %s: its init ended: %s', item.uuid, ended)
        if again:
            early = run['started_at'] + _MIN_UPTIME - time.time()
            time.sleep(min(max(early, 0), _MIN_UPTIME))
        elif run['started_at'] is not None:
            self._events.add('stopped', item.uuid, ended.to_dict())
        return again

    def _reboot_by_guest(self, entry: entries.Entry) -> None:
        item = entry.container
        try:
            self._host.prepare_again(entry)
            item.start()
        except errors.ContainerError as e:
            LOG.error('instance %s: it asked for a reboot, which failed: %s',
                      item.uuid, e)
            self._events.add(
                'stopped', item.uuid,
                item.st.exit.to_dict() if item.st.exit else None)
            return
        finally:
            entry.rebooting = False
        self._events.add('rebooted', item.uuid)
