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

"""Suspend and resume: the verbs, and what a restart of the agent finds.

:attr:`.state.State.suspended` is how far a container is:

``saving``
    it runs; what there is of a checkpoint is worth nothing
``saved``
    the checkpoint is whole, and no process may run any more
``restoring``
    as ``saved``, and what there is of it is frozen
``resumed``
    it runs, or has run; the checkpoint is of the past
``undecided``
    written by a release of format 3: as ``resumed`` if it is not frozen, else
    as ``restoring``
"""

import contextlib
import pathlib
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import checkpoint
from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import file_locks
from nova_pycontainer.runtime.migration import recovery
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import rescue
from nova_pycontainer.runtime import state

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import container
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

Info = dict[str, ty.Any]


class Checkpoints:
    """The suspended containers of one host."""

    def __init__(self, owner: 'host.Host', config: rconfig.Config) -> None:
        self._host = owner
        self._criu = criu.Criu(config.criu_path, owner.keeper)

    @staticmethod
    def _directory(item: 'container.Container') -> pathlib.Path:
        return item.disk.directory / 'checkpoint'

    @staticmethod
    def _mark(
        item: 'container.Container', phase: str | None,
        criu_pid: int | None = None,
    ) -> None:
        item.st.suspended = (
            {'phase': phase, 'at': time.time()} if phase else None)
        if item.st.suspended and criu_pid:
            with contextlib.suppress(ProcessLookupError):
                item.st.suspended['criu'] = process.ProcessId.of(
                    criu_pid).to_dict()
        item.st.save(item.directory)

    def suspend(self, uuid: str) -> Info:
        """Write a running container to its disk, with its memory, and end it.

        :raises ContainerError: it runs on: ``bad_state``, ``no_space``,
            ``criu_failed``
        """
        with self._host.locked(uuid) as entry:
            entry.require('running')
            entry.check_stays()
            item = entry.container
            rescue.check_not(item)
            self._host.snapshots.check_movable(uuid)
            # Its end is not the guest's doing.
            entry.stopping += 1
            try:
                self._mark(item, 'saving')
                saver = checkpoint.Saver(
                    item, self._criu, self._directory(item))
                try:
                    saver.run(lambda: self._mark(item, 'saved'))
                except BaseException:
                    self._mark(item, None)
                    raise
                self._put_down(item)
            finally:
                entry.stopping -= 1
            self._host.note('suspended', uuid)
            return item.info()

    def _put_down(self, item: 'container.Container') -> None:
        # No reset may be sent, see Saver.
        item.hold_network(True, lenient=True)
        item.kill()
        checkpoint.release(self._directory(item))
        item.teardown()
        item.st.run = item.st.exit = None
        item.st.save(item.directory)

    def resume(self, uuid: str, changes: Info | None = None) -> Info:
        """Restore a suspended container, and let it run.

        :param changes: as for :meth:`.host.Host.prepare`
        :raises ContainerError: it is suspended as before: ``bad_state``,
            ``layer_missing``, ``criu_failed``
        """
        with self._host.locked(uuid) as entry:
            entry.require('suspended')
            self._host.snapshots.check_startable(uuid)
            if changes:
                self._host.change(entry, dict(changes))
            item = entry.container
            self._mark(item, 'restoring')
            try:
                checkpoint.Restorer(
                    item, self._host.layer_root(item), self._criu,
                    self._directory(item),
                ).run(
                    begin=lambda pid: self._mark(item, 'restoring', pid),
                    commit=lambda: self._mark(item, 'resumed'))
            except BaseException:
                item.st.run = None
                self._mark(item, 'saved')
                raise
            self._host.watch(uuid)
            checkpoint.remove(self._directory(item))
            self._mark(item, None)
            self._host.note('resumed', uuid)
            return item.info()

    def discard(self, item: 'container.Container') -> None:
        """Forget the memory of a suspended container: it is off then.

        The caller has its lock.
        """
        LOG.info('instance %s: its checkpoint is discarded', item.uuid)
        item.disk.mount()
        try:
            checkpoint.remove(self._directory(item))
        finally:
            item.disk.unmount()
        item.st.exit = state.Exit()
        self._mark(item, None)

    def _take_locks(self, item: 'container.Container') -> None:
        try:
            file_locks.restore(item.cgroup, file_locks.read(
                self._directory(item), self._criu.messages()))
        except (OSError, ValueError, errors.ContainerError):
            # It runs, and there is no way back.
            LOG.exception('instance %s: its locks', item.uuid)

    def recover(self, item: 'container.Container') -> None:
        """Finish or undo what an agent before this one had begun."""
        suspended = item.st.suspended
        if suspended is None:
            return
        phase = suspended['phase']
        LOG.warning('instance %s: it was %s when the agent ended', item.uuid,
                    phase)
        alive = item.open() is not None
        if phase == 'undecided' and alive and not item.cgroup.frozen():
            phase = 'resumed'
        if phase not in ('saving', 'resumed'):
            # What it traces stays for as long as it does.
            recovery.end_restore({'criu': suspended.get('criu')})
            self._put_down(item)
            self._mark(item, 'saved')
        elif alive:
            # CRIU has let it go when it lost the agent.
            self._take_locks(item)
            recovery.thaw(item, False)
            try:
                checkpoint.remove(self._directory(item))
            except OSError as e:
                # CRIU may still write there, and learns of the end of its
                # agent at the next thing that it has to say. The next suspend
                # begins with this.
                LOG.warning('instance %s: its old checkpoint: %s', item.uuid,
                            e)
            self._mark(item, None)
        else:
            # What it has done since is on its disk, and not in what was
            # saved.
            self.discard(item)
