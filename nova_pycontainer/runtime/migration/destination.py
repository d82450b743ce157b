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

"""The destination's side of a migration. Its methods are the phases.
"""

import collections.abc as cabc
import contextlib
import pathlib
import socket
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import console_log
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import layers
from nova_pycontainer.runtime.migration import announce
from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import clocks
from nova_pycontainer.runtime.migration import file_locks
from nova_pycontainer.runtime.migration import guardian
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import layer_transfer
from nova_pycontainer.runtime.migration import lazy
from nova_pycontainer.runtime.migration import precopy
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import question
from nova_pycontainer.runtime.migration import recovery
from nova_pycontainer.runtime.migration import relay
from nova_pycontainer.runtime.migration import restoring
from nova_pycontainer.runtime.migration import room
from nova_pycontainer.runtime.migration import sync
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import unpack_client

LOG = logging.getLogger(__name__)

Phase = protocol.Phase

ROLES = ('control', 'layer', 'upper', precopy.ROLE, 'images', 'pages')
_ANSWER_TIMEOUT = 60.0
_DATA_TIMEOUT = 30.0
_COPY_TIMEOUT = 3600.0
_CRIU_TIMEOUT = 300.0
_RETRY = 1.0
_FILES = 'the files of the guest'


class Destination:
    """One container that is on its way to this host.

    :param item: it is defined: its directory, disk and id range are there
    :param ask_source: asks the source's journal; raises while it cannot be
        reached
    :param running: called once it runs here
    """

    def __init__(
        self,
        item: container.Container,
        store: layers.LayerStore,
        tool: criu.Criu,
        progress: protocol.Progress,
        directory: pathlib.Path,
        rate: int | None,
        peer: cabc.Mapping[str, ty.Any],
        on_running: ty.Callable[[], None],
        on_failed: ty.Callable[[], None],
        on_over: ty.Callable[[protocol.Phase], None],
    ) -> None:
        #: What each copied directory knows from earlier passes.
        self._copies: dict[str, sync.Copy] = {}
        self._item = item
        self._layers = store
        self._criu = tool
        self._memory = images.Memory(directory)
        self._limiter = bandwidth.Bandwidth(rate)
        #: Who the source is, for whoever has to ask or to be asked later.
        self._peer = dict(peer)
        self._on_running = on_running
        self._on_failed = on_failed
        self._on_over = on_over
        self._journal = protocol.Journal(item.directory)
        #: What is only for the migration, and what makes a container. The
        #: second is forgotten as soon as it runs.
        self._stack = contextlib.ExitStack()
        self._undo = contextlib.ExitStack()
        self._data: dict[tuple[str, int], channel.Connection] = {}
        self._arrived = threading.Condition()
        self._abort = threading.Event()
        self._control: protocol.Control | None = None
        self._began: dict[str, ty.Any] = {}
        self._paused = False
        self._pump: relay.Relay | None = None
        self._pages_end: socket.socket | None = None
        self._pages: relay.Relay | None = None
        self._daemon: lazy.Daemon | None = None
        self._session: criu.Session | None = None
        #: The init that CRIU makes, long before it is in its control group.
        self._init: int | None = None
        self._rounds = precopy.Received(self._memory.path)
        #: Bytes of memory that came before the dump.
        self._ahead = 0
        #: For whoever lets it run when this agent has died.
        self._locks: list[file_locks.Lock] = []
        self._guardian: guardian.Guardian | None = None
        #: Whether the console was no session's terminal.
        self._unowned = False
        self._images = images.Receiver(
            self._memory.path, self._count_images, self._images_failed)
        self._writing = room.Writing(_FILES, item.disk, item.directory)
        self._go = threading.Event()
        self._lock = threading.Lock()
        self.progress = progress
        #: The source has been, or is just being, told that it can run here.
        self.asked = False
        #: It may run here: the source has committed.
        self.committed = False
        self._resumed = False

    # Preparation, in the call that announces the migration

    def prepare(self) -> None:
        """Make all that needs no data of the guest's.

        :raises ContainerError: nothing is left of it
        """
        item = self._item
        try:
            self._journal.write(Phase.PREPARED, **self._facts())
            item.disk.mount()
            self._undo.callback(item.disk.unmount)
            self._memory.mount(
                images.size_of(item.spec.limits, ahead=True))
            self._stack.callback(self._memory.unmount)
            self._stack.callback(self._images.stop)
            for nic in item.spec.nics:
                network.plug(nic)
            self._undo.callback(item.teardown)
            item.take_cpus()
            procs = item.cgroup.create_legacy(item.limits)
            self._guardian = guardian.Guardian(self._criu, item.cgroup)
            self._stack.callback(self._guardian.close)
            self._session = self._stack.enter_context(self._criu.session(
                cgroup_procs=procs, fds=self._guardian.fds))
            self._guardian.given()
            self._journal.write(Phase.PREPARED, **self._facts())
            self._filler = guest.RamfsFiller()
            self._messages = self._criu.messages()
            self._stack.callback(self._filler.close)
        except BaseException:
            self._take_back()
            raise

    def _facts(self) -> dict[str, ty.Any]:
        """For the journal."""
        facts: dict[str, ty.Any] = {
            'role': 'destination', 'migration': self.progress.migration,
            'paused': self._paused, 'peer': self._peer,
            'lazy': self._daemon is not None, 'locks': self._locks}
        for name, pid in (
                ('criu', self._session.pid if self._session else None),
                ('init', self._init)):
            with contextlib.suppress(ProcessLookupError):
                if pid is not None:
                    facts[name] = process.ProcessId.of(pid).to_dict()
        return facts

    def _take_back(self) -> None:
        for stack in (self._stack, self._undo):
            try:
                stack.close()
            except Exception:
                LOG.exception('instance %s: cleaning up', self._item.uuid)

    # Connections of the source

    def connected(self, connection: channel.Connection) -> None:
        """A connection has come in, authenticated and for this migration."""
        role, seq = connection.hello.role, connection.hello.seq
        if role == 'control' and self._begin(connection):
            threading.Thread(
                target=self._run, name=f'incoming-{self._item.uuid[:8]}',
                daemon=True).start()
        elif role == 'control':
            threading.Thread(
                target=self._answer, args=(connection,), name='query',
                daemon=True).start()
        elif role == 'pages':
            self._pages_end = self._lead_pages(connection)
        elif role == 'images':
            threading.Thread(
                target=self._images.receive, args=(connection,),
                name='images', daemon=True).start()
        else:
            with self._arrived:
                self._data[role, seq] = connection
                self._arrived.notify_all()

    def _begin(self, connection: channel.Connection) -> bool:
        """Whether it is the first, and for a migration that goes on.

        Else an abort that came just before would end it, and the thread of
        this connection too, both at once.
        """
        with self._lock:
            if self._control is not None or self._abort.is_set():
                return False
            self._control = protocol.Control(connection)
            self._control.on_abort = lambda reason: self._abort.set()
            return True

    def _lead_pages(self, connection: channel.Connection) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._pages = relay.Relay(
            connection, ours, limiter=self._limiter,
            idle_s=_COPY_TIMEOUT).start()
        self._stack.callback(self._pages.abort)
        return theirs

    def _take(self, role: str, seq: int) -> channel.Connection:
        with self._arrived:
            if not self._arrived.wait_for(
                    lambda: (role, seq) in self._data, _DATA_TIMEOUT):
                raise errors.ContainerError(
                    'timeout', f'the connection {role} {seq} did not come')
            return self._data.pop((role, seq))

    def abort(self, reason: str) -> None:
        """Give up, unless it may run here already.

        :raises ContainerError: ``bad_state``
        """
        with self._lock:
            if self.committed:
                raise errors.ContainerError(
                    'bad_state', 'the instance runs here already',
                    uuid=self._item.uuid)
            self.progress.error = self.progress.error or (
                errors.ContainerError(
                    'aborted', 'the migration was aborted',
                    cause=reason).to_dict())
            again = self._abort.is_set()
            self._abort.set()
        if self._control is not None:
            self._control.close()
            if self._pump is not None:
                self._pump.abort()
        elif not again:
            self._finish(errors.ContainerError(
                'aborted', 'the migration was aborted', cause=reason))
            self._on_over(self._phase)

    def settle(self, identity: keys.Identity) -> None:
        """Let it run, since its source will never say so.

        :raises ContainerError: ``bad_state``: the source's agent is there
        """
        question.check_silent(
            identity, self._peer, self.progress.migration, self._item.uuid)
        self._hear_go()

    def _hear_go(self) -> None:
        """On another connection than where it was expected."""
        self._go.set()
        if self._control is not None:
            self._control.put('go')

    # The phases

    def _run(self) -> None:
        try:
            with room.needed(_FILES, self._item.directory):
                self._serve()
        except BaseException as e:
            if not isinstance(e, errors.ContainerError):
                LOG.exception('instance %s: it cannot come', self._item.uuid)
            self._finish(e)
        self._on_over(self._phase)

    @property
    def lazy(self) -> bool:
        """Whether it is a post-copy: pages follow the guest."""
        return self._daemon is not None

    @property
    def _phase(self) -> Phase:
        """For a source that asks: whatever became of it since, it may have
        run here.
        """
        return Phase.COMPLETED if self._resumed else self.progress.phase

    def _finish(self, error: BaseException | None) -> None:
        if error is not None and not self._resumed:
            self.progress.error = errors.ContainerError.of(
                error, 'the migration failed here', self._item.uuid).to_dict()
            self.progress.phase = (
                Phase.ABORTED if self._abort.is_set() else Phase.FAILED)
            # Written before the source is told: what it acts upon must
            # survive us.
            with contextlib.suppress(OSError):
                self._journal.write(self.progress.phase, **self._facts())
        if not self._resumed:
            recovery.silence(self._item)
            recovery.end_restore(self._facts())
            self._item.cgroup.kill()
        self._take_back()
        if self._resumed:
            # What failed is not the guest's concern any more.
            self._arrived_all_the_same(error)
        if self._control is not None:
            if error is not None and not self._resumed:
                with contextlib.suppress(errors.ContainerError):
                    self._control.send('failed', error=self.progress.error)
            self._control.close()
        with self._arrived:
            for connection in self._data.values():
                connection.close()
            self._data.clear()
        self.progress.ended_at = time.time()
        if not self._resumed:
            self._on_failed()

    def _serve(self) -> None:
        assert self._control is not None
        self._began = self._control.expect('begin', _ANSWER_TIMEOUT)
        if int(self._began['base_id']) != self._item.st.base_id:
            raise errors.ContainerError(
                'invalid', 'the source speaks of another range of ids',
                uuid=self._item.uuid)
        self._paused = bool(self._began['paused'])
        self.progress.strategy = self._began.get('strategy')
        layer_transfer.take(
            self._control, self._layers, self._item.spec.layer,
            self._began.get('layer'),
            lambda seq, stats: self._connected_socket('layer', seq, stats),
            self._abort.is_set, self.progress)
        faults.point('destination.prepared')
        self._control.send('prepared', rounds=True, overruns=True)
        while True:
            frame = self._control.receive(_COPY_TIMEOUT)
            if frame['type'] == 'files':
                self._fetch(str(frame['what']), int(frame['seq']),
                            bool(frame['final']))
            elif frame['type'] == 'memory':
                self._take_round(int(frame['round']), int(frame['seq']))
            elif frame['type'] == 'dumped':
                break
            else:
                raise errors.ContainerError(
                    'invalid', f'the source said {frame["type"]!r}')
        self._restore(frame)

    def _fetch(self, what: str, seq: int, final: bool) -> None:
        """One pass over the files."""
        assert self._control is not None
        self.progress.phase = Phase.COPYING
        directory = {'upper': self._item.disk.upper,
                     'drive': self._item.config_drive}[what]
        directory.mkdir(mode=0o755, exist_ok=True)
        copy = self._copies.setdefault(what, sync.Copy(directory))
        with room.needed(_FILES, self._item.directory), (
                self._connected_socket('upper', seq)) as sock:
            stats = copy.fetch(sock, final=final)
        if what == 'upper' and final:
            # While the rest is dumped and restored.
            self._writing.start()
        elif what == 'upper':
            room.check_written(_FILES, self._item.disk, self._item.directory)
        faults.point('destination.pass')
        self.progress.passes += 1
        self.progress.disk_sent += stats.received
        self._control.send(
            'files', seq=seq, bytes=stats.received, complete=stats.complete)

    def _take_round(self, number: int, seq: int) -> None:
        """Memory of the guest, which runs on and may write to it again."""
        assert self._control is not None
        self.progress.strategy = 'pre-copy'
        connection = self._take(precopy.ROLE, seq)
        before = self._ahead

        def progress(total: int) -> None:
            self.progress.memory_sent = before + total

        try:
            with room.needed('the pages of the guest\'s memory'):
                self._ahead += self._rounds.take(number, connection, progress)
        finally:
            connection.close()
        self._control.send('memory')

    @contextlib.contextmanager
    def _connected_socket(
        self, role: str, seq: int, stats: relay.Stats | None = None
    ) -> cabc.Iterator[socket.socket]:
        """A socket that leads to the source. An abort closes it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._pump = relay.Relay(
                self._take(role, seq), ours, limiter=self._limiter,
                stats=stats).start()
            try:
                if self._abort.is_set():
                    raise errors.ContainerError(
                        'aborted', 'the migration was aborted')
                yield theirs
            finally:
                self._pump.abort()

    def _count_images(self, total: int) -> None:
        self.progress.memory_sent = self._ahead + total

    def _images_failed(self, error: errors.ContainerError) -> None:
        # Who waits for the source tells it why, before it only sees that a
        # connection broke.
        if self._control is not None:
            self._control.fail(error)

    def _restore(self, dumped: cabc.Mapping[str, ty.Any]) -> None:
        item = self._item
        began = time.monotonic()
        self._images.wait(_COPY_TIMEOUT)
        self.progress.phase = Phase.FROZEN
        faults.point('destination.images')
        self._rounds.link(dumped.get('parent'))
        self._moment = dumped['moment']
        with self.progress.timed('patches'):
            self._unowned = restoring.mend(
                self._memory.path, self._messages, self._moment)
        item.mount_root(self._layers.require(item.spec.layer).root)
        restoring.make_surroundings(item, dumped)
        console_log.unpack(item.log, dumped.get('console'), item.log_bytes)
        options = restoring.options(
            self._criu, item, self._memory.path, dumped)
        if dumped.get('lazy'):
            # It may have been stop-and-copy in the beginning.
            self.progress.strategy = 'post-copy'
            if self._pages_end is None:
                raise errors.ContainerError(
                    'invalid', 'the source has no connection for pages')
            with self._pages_end as pages:
                self._daemon = lazy.Daemon(
                    self._criu, self._memory.path, pages, item.cgroup)
            self._stack.callback(self._daemon.close)
            options.lazy_pages = True
        else:
            # Each page is let go as soon as it is where it belongs.
            options.auto_dedup = True
        self._locks = file_locks.read(self._memory.path, self._messages)
        restore = restoring.Notified(self, dumped, item, self._locks)
        guard: ty.ContextManager[object] = (
            lazy.userfaultfd(self._memory.path.parent) if self._daemon
            else contextlib.nullcontext())
        self.progress.steps['prepare-restore'] = time.monotonic() - began
        assert self._session is not None
        try:
            with guard:
                response = self._session.request(
                    self._criu.rpc.RESTORE, options, restore.notified,
                    _CRIU_TIMEOUT, self._daemon)
        except errors.ContainerError as e:
            if not self._resumed:
                raise
            LOG.warning('instance %s: it runs, and criu: %s', item.uuid, e)
            response = None
        finally:
            restore.close()
        self.progress.steps['restore'] = time.monotonic() - began
        if response is not None and not response.success and (
                not self._resumed):
            raise criu.failed(
                'the instance cannot be restored', item.uuid, 'restore',
                self._memory.path / 'restore.log', item.log_directory,
                response, 'Run "pycontainer preflight" on both hosts')
        self._complete()

    def _warn_of_oom(self) -> None:
        """A page that comes is charged to the guest, whose processes the
        kernel kills when there is no memory for it.
        """
        kills = self._item.cgroup.usage().oom_kills
        if kills:
            LOG.warning(
                'instance %s: the kernel has killed %d of its processes since '
                'it came here, for lack of memory: its own, or what this host '
                'has for all instances', self._item.uuid, kills)

    def _complete(self) -> None:
        """It runs: what was only for the migration goes.

        :raises ContainerError: ``lost``: pages of it never came
        """
        if self._daemon is not None:
            try:
                self._daemon.wait(lazy.LONGEST)
            except errors.ContainerError as e:
                e.uuid = self._item.uuid
                self._lose(e)
                raise
            if self._pages is not None:
                # The source hears of the end in order.
                self._pages.wait(_RETRY)
            self._warn_of_oom()
        # The source deletes its copy soon.
        unpack_client.sync_filesystem(self._item.disk.upper)
        self._take_back()
        self._journal.remove()
        self.progress.phase = Phase.COMPLETED
        self.progress.ended_at = time.time()
        if self._control is not None:
            self._control.close()

    def _arrived_all_the_same(self, error: BaseException | None) -> None:
        with contextlib.suppress(OSError):
            self._journal.remove()
        if self.progress.phase not in protocol.ENDED:
            LOG.error('instance %s: it runs here, and the end of its '
                      'migration failed: %s', self._item.uuid, error)
            self.progress.phase = Phase.COMPLETED

    def _lose(self, error: errors.ContainerError) -> None:
        """A guest without its pages would hang or go wrong: end it. That this
        may happen is the price of post-copy.
        """
        LOG.error('instance %s is lost: %s', self._item.uuid, error)
        self.progress.error = error.to_dict()
        self.progress.phase = Phase.FAILED
        self._item.cgroup.kill()

    # In the middle of the restore

    def begun(self, pid: int) -> None:
        """CRIU has made the guest's init."""
        self._init = pid

    def fill(self, pid: int, saved: list[dict[str, ty.Any]]) -> None:
        self._filler.fill(pid, saved, self._item.st.base_id)

    def ready(self, pid: int, master: int | None) -> None:
        """Everything is restored and nothing has run. Ask for the right to.

        It is used when CRIU has let go of all: until then it is certain that
        nothing has run here.

        :raises ContainerError: it will never run here; its processes are
            dead
        """
        item = self._item
        assert self._guardian is not None
        try:
            faults.point('destination.rebuilt')
            self._guardian.freeze()
            faults.point('destination.restored')
            clocks.restore(pid, item.cgroup, self._moment['timers'])
            item.st.arrived = {
                'migration': self.progress.migration, 'peer': self._peer,
                'at': time.time()}
            item.adopt(
                pid, self._began['run'], master, unowned=self._unowned)
            if not self.committed:
                self.ask()
        except BaseException:
            # CRIU does not heed a refusal at this moment.
            recovery.silence(item)
            item.cgroup.kill()
            assert self._session is not None
            self._session.kill()
            raise

    def ask(self) -> None:
        """Say that it can run here, and wait for the source's commit.

        :raises ContainerError: it will never run here
        """
        assert self._control is not None
        self._writing.result()
        facts = self._facts()
        self._journal.write(Phase.READY, **facts)
        self.progress.phase = Phase.READY
        faults.point('destination.ready')
        self.asked = True
        self._control.send('ready')
        faults.point('destination.asked')
        self._wait_for_go()
        faults.point('destination.go')
        self._journal.write(Phase.COMMITTED, **facts)
        faults.point('destination.committed')

    def _wait_for_go(self) -> None:
        assert self._control is not None
        while True:
            try:
                self._control.expect('go', _ANSWER_TIMEOUT)
                break
            except protocol.PeerGone:
                # The source may have committed and asks, on a connection of
                # its own; only it knows. It asks at once when it sees that
                # this one does not work.
                if self._control.broken:
                    self._control.close()
                if self._abort.is_set():
                    raise
                if self._go.wait(_RETRY):
                    break
        with self._lock:
            if self._abort.is_set():
                raise errors.ContainerError(
                    'aborted', 'the migration was aborted')
            self.committed = True
            self.progress.phase = Phase.COMMITTED

    def resumed(self, pid: int) -> None:
        """CRIU is done: let it run. Tell the network, then the source.

        :raises ContainerError: it will never run here
        """
        item = self._item
        item.hold_network(self._paused)
        self._resumed = True
        self._undo.pop_all()
        if not self._paused:
            (item.cgroup.v2 / 'cgroup.freeze').write_text('0')
        self.progress.phase = Phase.RUNNING
        # None of these is a reason to end a guest that runs.
        for tell in (self._announce, self._say_running, self._tell_host):
            try:
                tell(pid)
            except Exception:
                LOG.exception('instance %s: it runs', item.uuid)

    def _announce(self, pid: int) -> None:
        faults.point('destination.resumed')
        announce.announce(self._item, pid)

    def _say_running(self, pid: int) -> None:
        if self._control is not None:
            with contextlib.suppress(errors.ContainerError):
                self._control.send('running')
        faults.point('destination.running')

    def _tell_host(self, pid: int) -> None:
        self._on_running()

    def _answer(self, connection: channel.Connection) -> None:
        """A source that has lost the first connection asks."""
        control = protocol.Control(connection)
        try:
            theirs = control.expect('query', _ANSWER_TIMEOUT)['phase']
            if theirs == Phase.ABORTED:
                self._abort.set()
            elif theirs == Phase.COMMITTED and (
                    self.progress.phase == Phase.READY):
                self._hear_go()
            control.send('phase', phase=self._phase)
        except errors.ContainerError as e:
            LOG.warning('instance %s: %s', self._item.uuid, e)
        finally:
            control.close()
