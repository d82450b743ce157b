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

"""Migrations of a host's containers: the verbs, and who is under way.
"""

import collections
import collections.abc as cabc
import contextlib
import dataclasses
import pathlib
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import announce
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import cold
from nova_pycontainer.runtime.migration import destination as dst
from nova_pycontainer.runtime.migration import drain
from nova_pycontainer.runtime.migration import file_locks
from nova_pycontainer.runtime.migration import identity
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import lazy
from nova_pycontainer.runtime.migration import listener
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import question
from nova_pycontainer.runtime.migration import recovery
from nova_pycontainer.runtime.migration import room
from nova_pycontainer.runtime.migration import source as src
from nova_pycontainer.runtime.migration import versions
from nova_pycontainer.runtime import rescue

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

_KEEP = 200
_END_TIMEOUT = 60.0
#: A day, for a host that was given up to come back.
_RESOLVED_S = 86400.0
#: A source that was cut off may ask for so long whether its instance runs.
_ANSWER_FOR = 7 * 86400.0

Info = dict[str, ty.Any]


class Migrations:
    """The migrations from and to one host."""

    def __init__(self, owner: 'host.Host', config: rconfig.Config) -> None:
        self._host = owner
        self._config = config
        self._lock = threading.Lock()
        self._ended: collections.OrderedDict[str, protocol.Progress] = (
            collections.OrderedDict())
        self._sources: dict[
            str, src.Source | recovery.SourceQuestion] = {}
        self._destinations: dict[
            str, dst.Destination | recovery.DestinationQuestion |
            recovery.Answer | cold.Offer | cold.Taking] = {}
        self._changed = threading.Condition()
        self._listener: listener.Listener | None = None
        #: Of the images that another agent has left, by migration.
        self._left_locks: dict[str, list[file_locks.Lock]] = {}

    def start(self) -> None:
        """Open the listener.

        :raises ContainerError: ``network``: the address is not ours
        """
        c = self._config
        self._identity = identity.load(c)
        self._criu = criu.Criu(c.criu_path, self._host.keeper)
        # Of migrations that another agent began: their connections are gone.
        for directory in (c.run_dir / 'migration').glob('*'):
            if directory.is_dir():
                self._left_locks[directory.name] = self._read_locks(directory)
                images.Memory(directory).unmount()
        for path in (c.run_dir / 'migration').glob('*.conf'):
            path.unlink()
        lazy.put_back(c.run_dir / 'migration')
        self._listener = listener.Listener(
            c.migration_listen, c.migration_ports, self._identity,
            self._connected)

    def _read_locks(self, directory: pathlib.Path) -> list[file_locks.Lock]:
        try:
            return file_locks.read(directory, self._criu.messages())
        except Exception as e:
            # The half of an image, for one, of a dump that was cut off.
            LOG.info('%s: %s', directory, e)
            return []

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def drain(self, grace_s: float,
              go_on: cabc.Callable[[], bool]) -> list[str]:
        """Before :meth:`close`; see :func:`.drain.drain`."""
        return drain.drain(self._moves, grace_s, go_on)

    def _moves(self) -> list[src.Source | dst.Destination]:
        with self._lock:
            jobs = [*self._sources.values(), *self._destinations.values()]
        return [job for job in jobs
                if isinstance(job, src.Source | dst.Destination)]

    def identity(self) -> Info:
        """What a source has to know of this host."""
        assert self._listener is not None
        return {
            **versions.own(),
            'certificate': self._identity.certificate,
            'fingerprint': self._identity.fingerprint(),
            'address': self._config.migration_address,
            'port': self._listener.port,
        }

    # After a restart

    def recover(self, uuid: str) -> None:
        """Finish or undo what the journal of a container tells of.

        Called for each container while the host starts.
        """
        entry = self._host.entry(uuid)
        item = entry.container
        journal = protocol.Journal(item.directory)
        facts = journal.read()
        if facts is None or facts['phase'] == protocol.Phase.COMMITTED:
            self._be_ready_to_answer(uuid)
        if facts is None:
            return
        migration, phase = str(facts['migration']), facts['phase']
        progress = protocol.Progress(migration, uuid, facts['role'])
        # An agent of state format 3 has not written them down.
        facts.setdefault('locks', self._left_locks.get(migration, []))
        LOG.warning('instance %s: its migration %s was %s as %s when the '
                    'agent ended', uuid, migration, phase, facts['role'])
        if facts['role'] == 'source':
            if phase != protocol.Phase.COMMITTED:
                # CRIU has let it go when it lost us.
                recovery.thaw(item, bool(facts.get('paused')))
                journal.remove()
                threading.Thread(
                    target=self._call_off, name='call-off', daemon=True,
                    args=(item, facts)).start()
                return
            question = recovery.SourceQuestion(
                item, self._identity, facts, progress,
                moved=lambda: self._settle(uuid, migration, True),
                stays=lambda: self._settle(uuid, migration, False))
            entry.migration = question
            with self._lock:
                self._sources[migration] = question
        elif phase == protocol.Phase.COMMITTED and item.st.run is not None:
            self._has_come(item, facts)
            journal.remove()
        elif phase == protocol.Phase.READY:
            lazy.forget(self._directory(migration))
            waiting = recovery.DestinationQuestion(
                item, facts, progress,
                running=lambda: self._settled_here(uuid, migration),
                failed=lambda: self._failed(uuid, migration))
            entry.migration = waiting
            with self._lock:
                self._destinations[migration] = waiting
            self._expect(migration, uuid, facts['peer'])
        else:
            # Its source runs it: nothing was promised; or it was, and so
            # little was restored that nothing can have run. It may have
            # committed all the same, and asks.
            if phase in (protocol.Phase.COMMITTED, protocol.Phase.ABORTED,
                         protocol.Phase.FAILED):
                with self._lock:
                    self._destinations[migration] = recovery.Answer(
                        progress, protocol.Phase.FAILED)
                self._expect(migration, uuid, facts['peer'])
            recovery.end_restore(facts)
            lazy.forget(self._directory(migration))
            recovery.silence(item)
            item.cgroup.kill()
            journal.remove()
            self._host.delete(uuid)

    def _call_off(self, item: container.Container, facts: Info) -> None:
        question.call_off(
            self._identity, facts['endpoint'], str(facts['migration']),
            item.uuid)
        # The copy there has sent again what was not acknowledged, maybe after
        # the guest here had: switches believe who was the last.
        pid = item.live_pid()
        if pid is not None:
            announce.announce(item, pid)

    def _has_come(self, item: container.Container, facts: Info) -> None:
        """It was given to this host, and was restored. It has run, or not:
        only here it may go on.
        """
        uuid = item.uuid
        directory = self._directory(str(facts['migration']))
        came = not facts.get('lazy') or lazy.complete(directory)
        lazy.forget(directory)
        if not came:
            LOG.error('instance %s is lost: the agent ended before all of '
                      'its pages had come', uuid)
            recovery.end_restore(facts)
            item.cgroup.kill()
        elif item.open() is not None:
            recovery.release(item, facts)
            self._host.note('started', uuid)
        else:
            LOG.error('instance %s has come, and has ended since', uuid)

    def _be_ready_to_answer(self, uuid: str) -> None:
        arrived = self._host.entry(uuid).container.st.arrived
        if arrived and time.time() - arrived['at'] < _ANSWER_FOR:
            migration = str(arrived['migration'])
            with self._lock:
                self._destinations[migration] = recovery.Answer(
                    protocol.Progress(migration, uuid, 'destination'))
            self._expect(migration, uuid, arrived['peer'])

    def _settle(self, uuid: str, migration: str, moved: bool) -> None:
        entry = self._host.entry(uuid)
        with entry.lock:
            if moved:
                self._gone(uuid, migration)
            else:
                protocol.Journal(entry.container.directory).remove()
            entry.migration = None
        with self._lock:
            question = self._sources.get(migration)
        if question is not None:
            question.progress.phase = (
                protocol.Phase.COMPLETED if moved else
                protocol.Phase.ABORTED)
            question.progress.ended_at = time.time()
            self._remember(question.progress)
        with self._lock:
            self._sources.pop(migration, None)

    def _settled_here(self, uuid: str, migration: str) -> None:
        self._host.entry(uuid).migration = None
        protocol.Journal(
            self._host.entry(uuid).container.directory).remove()
        self._host.note('started', uuid)
        self._end(migration)

    # Destination

    def prepare(
        self, uuid: str, migration: str, spec: Info, source: Info,
        options: Info | None = None,
    ) -> Info:
        """Make this host ready for a container; see :mod:`.destination`.

        :param spec: as for :meth:`.host.Host.define`, with ``base_id``
        :param source: ``certificate`` of the source's agent
        :returns: where the source has to connect to
        """
        rconfig.check_uuid(migration)
        versions.check(source, 'source')
        opts = protocol.Options.from_dict(options or {})
        assert self._listener is not None
        # The layer may come from the source.
        with room.needed('the disk and the description of the guest'):
            self._host.define(uuid, spec, layer_later=True)
        progress = protocol.Progress(migration, uuid, 'destination')
        try:
            entry = self._host.entry(uuid)
            item = entry.container
            incoming = dst.Destination(
                item, self._host.layers, self._criu, progress,
                self._directory(migration), opts.bandwidth, source,
                on_running=lambda: self._arrived(uuid, migration),
                on_failed=lambda: self._failed(uuid, migration),
                on_over=lambda phase: self._over(migration, phase))
            incoming.prepare()
        except BaseException:
            try:
                self._host.delete(uuid)
            except errors.ContainerError as e:
                # The first error is the one to report.
                LOG.error('instance %s: %s', uuid, e)
            raise
        entry.migration = incoming
        with self._lock:
            self._destinations[migration] = incoming
        self._expect(migration, uuid, source)
        return self.identity()

    def _expect(self, migration: str, uuid: str, source: Info,
                roles: cabc.Iterable[str] = dst.ROLES) -> None:
        assert self._listener is not None
        self._listener.expect(
            migration, uuid, question.peer(source), roles, _ANSWER_FOR)

    # For cold migrations

    def expect(self, migration: str, uuid: str, peer: Info, offer: cold.Offer,
               roles: cabc.Iterable[str]) -> None:
        """Let another host connect to an offer."""
        self.add(migration, offer)
        self._expect(migration, uuid, peer, roles)

    def add(self, migration: str, job: cold.Offer | cold.Taking) -> None:
        """Answer who asks for a migration."""
        with self._changed:
            # Of an earlier try.
            self._ended.pop(migration, None)
        with self._lock:
            self._destinations[migration] = job

    def forget(self, migration: str) -> None:
        assert self._listener is not None
        self._listener.forget(migration)
        with self._lock:
            self._destinations.pop(migration, None)

    def connect(self, endpoint: src.Endpoint, hello: channel.Hello,
                timeout: float) -> channel.Connection:
        """Connect to another host."""
        return channel.connect(
            endpoint.address, endpoint.port, self._identity,
            question.peer(dataclasses.asdict(endpoint)), hello, timeout)

    def ended(self, progress: protocol.Progress) -> None:
        progress.ended_at = time.time()
        self._remember(progress)

    def _directory(self, migration: str) -> pathlib.Path:
        return self._config.run_dir / 'migration' / migration

    def _connected(self, connection: channel.Connection) -> None:
        with self._lock:
            incoming = self._destinations.get(connection.hello.migration)
        if incoming is None:
            connection.close()
            return
        incoming.connected(connection)

    def _arrived(self, uuid: str, migration: str) -> None:
        self._host.watch(uuid)
        self._host.entry(uuid).migration = None
        self._host.note('started', uuid)
        self._end(migration)

    def _failed(self, uuid: str, migration: str) -> None:
        with contextlib.suppress(errors.ContainerError):
            self._host.entry(uuid).migration = None
            self._host.delete(uuid)
        self._end(migration)

    def _end(self, migration: str) -> None:
        assert self._listener is not None
        with self._lock:
            incoming = self._destinations.get(migration)
        if incoming is None:
            return
        if incoming.asked:
            # A source that has committed may not have heard how it ended.
            self._listener.restrict(migration, ('control',))
        else:
            self._listener.forget(migration)
        self._remember(incoming.progress)

    def _over(self, migration: str, phase: protocol.Phase) -> None:
        """Keep of it what somebody may still ask for, not its connections."""
        with self._lock:
            incoming = self._destinations.get(migration)
            if isinstance(incoming, dst.Destination):
                self._destinations[migration] = recovery.Answer(
                    incoming.progress, phase)

    def _remember(self, progress: protocol.Progress) -> None:
        with self._changed:
            self._ended[progress.migration] = progress
            while len(self._ended) > _KEEP:
                old, _ = self._ended.popitem(last=False)
                if self._destinations.pop(old, None) is not None:
                    assert self._listener is not None
                    self._listener.forget(old)
            self._changed.notify_all()

    # Source

    def begin(
        self, uuid: str, migration: str, destination: Info,
        options: Info | None = None,
    ) -> Info:
        """Start to move a container away; :meth:`status` tells how it goes.

        :param destination: what :meth:`prepare` returned there
        """
        rconfig.check_uuid(migration)
        versions.check(destination, 'destination')
        opts = protocol.Options.from_dict(options or {})
        entry = self._host.entry(uuid)
        with self._host.locked(uuid):
            entry.require('running', 'paused')
            self._host.snapshots.check_movable(uuid)
            rescue.check_not(entry.container)
            if entry.container.spec.root:
                raise errors.ContainerError(
                    'unsupported', 'the root of the instance is a volume, '
                    'which no two hosts can have mounted at a time',
                    uuid=uuid, remedy='Migrate it cold')
            if entry.migration is not None:
                raise errors.ContainerError(
                    'bad_state', 'the instance is being migrated already',
                    uuid=uuid)
            entry.check_stays()
            progress = protocol.Progress(migration, uuid, 'source')
            item = entry.container
            outgoing = src.Source(
                item, self._host.layers, self._criu,
                self._identity, src.Endpoint.from_dict(destination), opts,
                progress, self._directory(migration))
            entry.migration = outgoing
        with self._lock:
            self._sources[migration] = outgoing
        threading.Thread(
            target=self._run, args=(uuid, migration, outgoing),
            name=f'outgoing-{uuid[:8]}', daemon=True).start()
        return progress.to_dict()

    def _run(
        self, uuid: str, migration: str, outgoing: src.Source
    ) -> None:
        progress = outgoing.progress
        entry = self._host.entry(uuid)
        try:
            # Who wants to change the container meanwhile waits for the end,
            # or aborts first.
            with entry.lock:
                try:
                    outgoing.run()
                except Exception:
                    if progress.phase != protocol.Phase.RUNNING:
                        raise
                    # Of the cleaning up: the destination runs it.
                    LOG.exception('instance %s: it has moved', uuid)
                self._gone(uuid, migration)
            progress.phase = protocol.Phase.COMPLETED
        except BaseException as e:
            if not isinstance(e, errors.ContainerError):
                LOG.exception('instance %s: the migration failed', uuid)
            error = errors.ContainerError.of(e, 'the migration failed', uuid)
            LOG.warning(
                'instance %s: migration %s: %s', uuid, migration, error)
            progress.error = error.to_dict()
            if progress.phase not in protocol.ENDED:
                progress.phase = protocol.Phase.FAILED
        finally:
            entry.migration = None
            # After the phase, for those who look at it to know the end.
            progress.ended_at = time.time()
            self._remember(progress)
            # Last, so that it is known at every moment to who asks.
            with self._lock:
                self._sources.pop(migration, None)
            outgoing.close()

    def _gone(self, uuid: str, migration: str) -> None:
        """It runs on the other host: nothing of it may run here again."""
        item = self._host.entry(uuid).container
        # Its connections live on elsewhere: no reset may be sent.
        item.hold_network(True, lenient=True)
        # First, so that whatever fails after it cannot have it started here.
        item.st.moved = {'migration': migration, 'at': time.time()}
        with contextlib.suppress(OSError):
            item.st.save(item.directory)
        try:
            item.kill()
            item.st.run = None
            item.st.save(item.directory)
            protocol.Journal(item.directory).remove()
        except OSError as e:
            # The journal stays: it says that only the destination knows.
            LOG.error('instance %s: it has moved, which cannot be written '
                      'down: %s', uuid, e)
        except errors.ContainerError as e:
            LOG.error('instance %s: it has moved, and not all of its frozen '
                      'processes end here: %s', uuid, e)
        try:
            item.teardown()
        except (OSError, errors.ContainerError) as e:
            # It has moved all the same. Deleting what is left tries again.
            LOG.error('instance %s: it has moved, and cannot be cleaned up '
                      'here: %s', uuid, e)

    def resolve(self, uuid: str, runs: str) -> Info:
        """Settle a migration whose other host will never answer again.

        :param runs: ``here``: it has not run on the other host, and never
            will; ``elsewhere``: what there is of it here is to go
        :returns: its progress, at its end
        :raises ContainerError: ``bad_state``: there is nothing to settle, or
            the agents do it by themselves; ``invalid``
        """
        if runs not in ('here', 'elsewhere'):
            raise errors.ContainerError(
                'invalid', f'it cannot run {runs!r}')
        entry = self._host.entry(uuid)
        job = entry.migration
        phase = job.progress.phase if job is not None else None
        if isinstance(job, src.Source | recovery.SourceQuestion) and (
                phase == protocol.Phase.COMMITTED):
            here = runs == 'here'
            job.verdict.say(there=not here)
            self._wait_for_end(job.progress.migration)
            # It may come back, and wait to hear it.
            threading.Thread(
                target=question.tell, name='resolved', daemon=True,
                args=(self._identity, job.verdict.endpoint,
                      job.progress.migration, uuid, protocol.Phase.ABORTED
                      if here else protocol.Phase.COMMITTED,
                      _RESOLVED_S)).start()
        elif isinstance(job, dst.Destination | recovery.DestinationQuestion
                        ) and phase == protocol.Phase.READY:
            if runs == 'here':
                job.settle(self._identity)
            else:
                job.abort('an administrator has said that it runs elsewhere')
            self._wait_for_end(job.progress.migration)
        else:
            raise errors.ContainerError(
                'bad_state', 'it does not wait for another host', uuid=uuid)
        return self.status(job.progress.migration)

    # Both

    def _wait_for_end(self, migration: str) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: migration in self._ended, _END_TIMEOUT)

    def status(self, migration: str, wait_s: float = 0.0) -> Info:
        """How far it is, waiting at most ``wait_s`` seconds for its end.

        :raises ContainerError: ``not_found``
        """
        # Looked up first: what ends is among the ended before it leaves.
        with self._lock:
            job = (self._sources.get(migration) or
                   self._destinations.get(migration))
        with self._changed:
            if wait_s:
                self._changed.wait_for(
                    lambda: migration in self._ended, min(wait_s, 300.0))
            progress = self._ended.get(migration)
        if progress is None:
            if job is None:
                raise errors.ContainerError(
                    'not_found', f'there is no migration {migration} here')
            progress = job.progress
        return progress.to_dict()

    def force_complete(self, migration: str) -> None:
        """Do not wait any longer: freeze the guest now.

        With post-copy where the options of the migration permit it.

        :raises ContainerError: ``not_found``
        """
        with self._lock:
            job = self._sources.get(migration)
        if job is None:
            raise errors.ContainerError(
                'not_found', f'no migration {migration} leaves this host')
        job.force_complete()

    def abort(self, migration: str, reason: str) -> None:
        """End a migration before its commit, and wait for the end.

        :raises ContainerError: ``bad_state``: it has committed;
            ``not_found``
        """
        with self._lock:
            job = (self._sources.get(migration) or
                   self._destinations.get(migration))
        if job is None:
            raise errors.ContainerError(
                'not_found', f'there is no migration {migration} here')
        job.abort(reason)
        self._wait_for_end(migration)
