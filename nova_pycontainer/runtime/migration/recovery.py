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

"""Migrations that an agent finds in its journals when it starts.

Whoever died in the middle, the rule is the same: before its commit the
instance is the source's, after it the destination's, and who does not know
asks the other side's journal.
"""

import contextlib
import os
import pathlib
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import announce
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import file_locks
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import network_lock
from nova_pycontainer.runtime.migration import overruns
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import question
from nova_pycontainer.runtime.migration import verdict
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import process

LOG = logging.getLogger(__name__)

Phase = protocol.Phase

_ANSWER_TIMEOUT = 60.0
_KILL_TIMEOUT = 10.0


class SourceQuestion:
    """A source that has committed and does not know whether it runs there."""

    def __init__(
        self, item: container.Container, identity: keys.Identity,
        journal: ty.Mapping[str, ty.Any], progress: protocol.Progress,
        moved: ty.Callable[[], None], stays: ty.Callable[[], None],
    ) -> None:
        self._item = item
        self._paused = bool(journal.get('paused'))
        self._lazy = bool(journal.get('lazy'))
        self._moved, self._stays = moved, stays
        self.verdict = verdict.Verdict(
            identity, journal['endpoint'], progress)
        self.progress = progress
        self.committed = True
        progress.phase = Phase.COMMITTED
        threading.Thread(
            target=self._run, name=f'verdict-{item.uuid[:8]}',
            daemon=True).start()

    def abort(self, reason: str) -> None:
        raise errors.ContainerError(
            'bad_state', 'the migration has committed, and the destination '
            'has not said yet whether the instance runs there',
            uuid=self._item.uuid,
            remedy='Bring the agent of the destination back')

    def force_complete(self) -> None:
        self.abort('')

    def close(self) -> None:
        self.verdict.close()

    def _run(self) -> None:
        there = self.verdict.wait()
        if there is None:
            return
        if there:
            self._moved()
            return
        if self._lazy:
            # See Source._stays.
            self.progress.error = errors.ContainerError(
                'lost', 'the instance was lost: the destination failed after '
                'the commit', uuid=self._item.uuid,
                remedy='Start it again: its disk is as it was then',
            ).to_dict()
            self._item.cgroup.kill()
        else:
            thaw(self._item, self._paused)
        self._stays()


class DestinationQuestion:
    """A restored, frozen container whose source has not said "go" yet.

    It waits for the source, which asks as soon as it can.
    """

    asked = True

    def __init__(
        self, item: container.Container, journal_facts: ty.Mapping[
            str, ty.Any],
        progress: protocol.Progress, running: ty.Callable[[], None],
        failed: ty.Callable[[], None],
    ) -> None:
        self._item = item
        self._paused = bool(journal_facts.get('paused'))
        self._journal = protocol.Journal(item.directory)
        self._facts = journal_facts
        self._running, self._failed = running, failed
        self._lock = threading.Lock()
        self.progress = progress
        self.committed = False
        progress.phase = Phase.READY
        progress.error = errors.ContainerError(
            'network', 'the instance is restored and frozen here; whether '
            'it may run only the source knows', uuid=item.uuid,
            remedy='Bring the agent of the source back').to_dict()

    def connected(self, connection: channel.Connection) -> None:
        control = protocol.Control(connection)
        try:
            frame = control.expect('query', _ANSWER_TIMEOUT)
            with self._lock:
                phase = self._decide(Phase(frame['phase']))
            control.send('phase', phase=phase)
        except (ValueError, errors.ContainerError) as e:
            LOG.warning('instance %s: %s', self._item.uuid, e)
        finally:
            control.close()

    def settle(self, identity: keys.Identity) -> None:
        """Let it run, since its source will never say so.

        :raises ContainerError: ``bad_state``: the source's agent is there;
            ``lost``
        """
        question.check_silent(
            identity, self._facts['peer'], self.progress.migration,
            self._item.uuid)
        with self._lock:
            phase = self._decide(Phase.COMMITTED)
        if phase != Phase.RUNNING:
            raise errors.ContainerError(
                'lost', 'its processes have died here before they ran',
                uuid=self._item.uuid, remedy='Evacuate the server')

    def _decide(self, theirs: Phase) -> Phase:
        if self.progress.phase != Phase.READY:
            return self.progress.phase
        if theirs == Phase.COMMITTED:
            if self._item.open() is None:
                # Its processes died with CRIU: it has never run here.
                self._give_up()
            else:
                self.committed = True
                self._journal.write(Phase.COMMITTED, **{
                    k: v for k, v in self._facts.items()
                    if k not in ('phase', 'format')})
                release(self._item, self._facts)
                self.progress.phase = Phase.RUNNING
                self.progress.error = None
                self.progress.ended_at = time.time()
                self._running()
        elif theirs == Phase.ABORTED:
            self._give_up()
        return self.progress.phase

    def _give_up(self) -> None:
        silence(self._item)
        self.progress.phase = Phase.FAILED
        self.progress.ended_at = time.time()
        self._failed()

    def abort(self, reason: str) -> None:
        """Nova's rollback: the source has told it that it runs there."""
        with self._lock:
            if self.committed:
                raise errors.ContainerError(
                    'bad_state', 'the instance runs here already',
                    uuid=self._item.uuid)
            if self.progress.phase == Phase.READY:
                self._give_up()

    def close(self) -> None:
        pass


class Answer:
    """For a source that did not hear whether its instance has run here.

    :param progress: of a migration that has ended
    :param phase: what the source is told
    """

    asked = True

    def __init__(
        self, progress: protocol.Progress, phase: Phase = Phase.COMPLETED
    ) -> None:
        if progress.ended_at is None:
            progress.phase = phase
            progress.ended_at = time.time()
        self.progress = progress
        self._phase = phase

    def connected(self, connection: channel.Connection) -> None:
        control = protocol.Control(connection)
        try:
            control.expect('query', _ANSWER_TIMEOUT)
            control.send('phase', phase=self._phase)
        except errors.ContainerError as e:
            LOG.warning('instance %s: %s', self.progress.uuid, e)
        finally:
            control.close()

    def abort(self, reason: str) -> None:
        if self._phase == Phase.COMPLETED:
            raise errors.ContainerError(
                'bad_state', 'the instance runs here already',
                uuid=self.progress.uuid)


def end_restore(facts: ty.Mapping[str, ty.Any]) -> None:
    """End a restore that nobody waits for, and what it has made. It may wait
    for pages itself, and its processes for it.

    :param facts: of the destination's journal
    """
    for name in ('criu', 'init'):
        known = facts.get(name)
        fd = process.ProcessId.from_dict(known).open() if known else None
        if fd is not None:
            process.send_signal(fd, 9)
            process.exited(fd, _KILL_TIMEOUT)
            os.close(fd)


def silence(item: container.Container) -> None:
    """Before restored processes are killed: what the kernel then sends for
    their connections would end those of the source's.
    """
    for nic in item.spec.nics:
        with contextlib.suppress(errors.ContainerError, OSError):
            network.unplug(nic.devname)


def thaw(item: container.Container, paused: bool) -> None:
    """Let an instance that did not leave run on as it was before."""
    run = item.st.run
    try:
        if run is not None:
            network_lock.remove(int(run['process']['pid']), item.cgroup)
        item.hold_network(paused, lenient=True)
        overruns.tell_noted(item.cgroup, item.unread)
    finally:
        # Whatever was wrong, nobody else would.
        with contextlib.suppress(FileNotFoundError):
            pathlib.Path(item.cgroup.v2, 'cgroup.freeze').write_text(
                '1' if paused else '0')
    if run is not None:
        # A copy of it may have been heard on another host: its interfaces say
        # something as soon as they are there.
        announce.announce(item, int(run['process']['pid']))


def release(
    item: container.Container, facts: ty.Mapping[str, ty.Any]
) -> None:
    """Let a restored instance run. What of it is done already stays so.

    :param facts: of the destination's journal
    """
    paused = bool(facts.get('paused'))
    item.hold_network(paused)
    file_locks.restore(
        item.cgroup, [file_locks.Lock(*lock) for lock in facts['locks']],
        bool(facts.get('lazy')))
    thaw(item, paused)
