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

"""The source's side of a migration. Its methods are the phases.
"""

import contextlib
import dataclasses
import pathlib
import socket
import threading
import time
import types
import typing as ty

from oslo_log import log as logging
from pyroute2.netlink import exceptions as nl_exceptions

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import layers
from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import dumping
from nova_pycontainer.runtime.migration import frozen
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import layer_transfer
from nova_pycontainer.runtime.migration import lazy
from nova_pycontainer.runtime.migration import moment
from nova_pycontainer.runtime.migration import neighbours
from nova_pycontainer.runtime.migration import network_lock
from nova_pycontainer.runtime.migration import precopy
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import question
from nova_pycontainer.runtime.migration import recovery
from nova_pycontainer.runtime.migration import relay
from nova_pycontainer.runtime.migration import standstill
from nova_pycontainer.runtime.migration import sync
from nova_pycontainer.runtime.migration import sync_links
from nova_pycontainer.runtime.migration import verdict

LOG = logging.getLogger(__name__)

Phase = protocol.Phase

_CONNECT_TIMEOUT = 20.0
_DRAIN_TIMEOUT = 60.0
#: The guest stands still meanwhile.
_REASON_TIMEOUT = 5.0
#: CRIU works this long between two notifications at most.
_CRIU_TIMEOUT = 300.0
_RESTORE_TIMEOUT = 300.0
#: A pass that takes no longer than this will be as short while frozen.
_SHORT_PASS = 0.25
#: So many more if the last one was not complete: what it has left out would
#: be copied while the guest stands still.
_MORE_PASSES = 2


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """The destination's agent."""

    address: str
    port: int
    certificate: str
    hostname: str = ''

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'Endpoint':
        try:
            return cls(str(data['address']), int(data['port']),
                       str(data['certificate']),
                       str(data.get('hostname') or ''))
        except (KeyError, TypeError, ValueError) as e:
            raise errors.ContainerError(
                'invalid', f'the destination is not well described: {e}',
            ) from e


class Source:
    """One attempt to move one container away from this host."""

    def __init__(
        self,
        item: container.Container,
        store: layers.LayerStore,
        tool: criu.Criu,
        identity: keys.Identity,
        endpoint: Endpoint,
        options: protocol.Options,
        progress: protocol.Progress,
        directory: pathlib.Path,
    ) -> None:
        self._item = item
        self._layers = store
        self._criu = tool
        self._identity = identity
        self._endpoint = endpoint
        self._options = options
        self._memory = images.Memory(directory)
        self._logs = item.log_directory
        self._limiter = bandwidth.Bandwidth(options.bandwidth)
        self._seq = 0
        self._pages: relay.Relay | None = None
        #: The destination has all that it needs to run the instance.
        self._restorable = False
        #: What the destination can do beyond what all can.
        self._there: dict[str, ty.Any] = {}
        #: The last round of memory that was sent ahead of the dump.
        self._parent: str | None = None
        self.sent_ahead = 0
        #: Whether the pass before has copied all that it was to copy.
        self._complete = True
        #: When the pass before began.
        self._mark: sync.Mark | None = None
        self._abort = threading.Event()
        self._abort_reason = ''
        self._force = threading.Event()
        self.lazy = options.strategy == 'post-copy'
        progress.strategy = 'post-copy' if self.lazy else 'stop-and-copy'
        #: Guards the moment from which an abort comes too late.
        self._lock = threading.Lock()
        self._paused = item.status() == 'paused'
        self._control: protocol.Control | None = None
        self._journal = protocol.Journal(item.directory)
        self.verdict = verdict.Verdict(
            identity, dataclasses.asdict(endpoint), progress)
        self.moment = moment.Moment(
            item.cgroup, item.root, item.unread)
        self._stack = contextlib.ExitStack()
        self.progress = progress
        #: From here on only the peer can say who runs.
        self.committed = False
        #: It has been so, whatever the peer has said since.
        self._gave = False

    # What others may ask for

    def abort(self, reason: str) -> None:
        """Ask for an end before the commit.

        :raises ContainerError: ``bad_state``: it is too late
        """
        with self._lock:
            if self.committed:
                raise errors.ContainerError(
                    'bad_state', 'the instance runs on the destination '
                    'already', uuid=self._item.uuid)
            self._abort_reason = reason
            self._abort.set()
        LOG.info('instance %s: the migration is aborted: %s',
                 self._item.uuid, reason)
        # What waits for the destination need not wait for its answer.
        if self._control is not None:
            self._control.cancel(reason)

    def force_complete(self) -> None:
        """Stop waiting for a guest that changes too much: freeze it now; with
        the pages to follow, where that is permitted.
        """
        if self._options.permit_post_copy:
            self.lazy = True
            self.progress.strategy = 'post-copy'
        self._force.set()

    def check_abort(self) -> None:
        if self._abort.is_set():
            raise errors.ContainerError(
                'aborted', 'the migration was aborted',
                cause=self._abort_reason)

    # The phases

    def run(self) -> None:
        """Move the container.

        :raises ContainerError: it runs here, as if nothing had happened
        """
        try:
            with self._stack:
                self.connect()
                ahead = self._ahead()
                self.copy()
                if ahead:
                    self._send_ahead()
                self.hand_over()
        except BaseException as e:
            if not self.committed:
                self._fail(e)
                if self._abort_reason and not self._gave:
                    # What was in the middle of something ends with an error
                    # of its own.
                    self.check_abort()
            raise

    def close(self) -> None:
        """Hang up, when all is said; idempotent."""
        if self._control is not None:
            self._control.close()

    def _fail(self, error: BaseException) -> None:
        self._stack.close()
        # After the commit it is the destination that has failed, or the guest
        # is lost, of whose end we are told too.
        aborted = self._abort.is_set() and not self._gave
        if self._control is not None:
            with contextlib.suppress(errors.ContainerError):
                self._control.send('abort', reason=str(error))
            self._control.close()
            if self._restorable:
                # It may wait for us, restored and frozen. A frame that was
                # sent last may be lost with its connection, so we ask until
                # it has answered.
                threading.Thread(
                    target=question.call_off, name='call-off', daemon=True,
                    args=(self._identity,
                          dataclasses.asdict(self._endpoint),
                          self.progress.migration, self._item.uuid),
                ).start()
        self._journal.remove()
        self.progress.phase = Phase.ABORTED if aborted else Phase.FAILED

    def _connect(self, role: str) -> channel.Connection:
        self._seq += 1
        return channel.connect(
            self._endpoint.address, self._endpoint.port, self._identity,
            question.peer(dataclasses.asdict(self._endpoint)),
            channel.Hello(
                self.progress.migration, self._item.uuid, role, self._seq),
            _CONNECT_TIMEOUT)

    def connect(self) -> None:
        """Dial, and tell what will come."""
        self._journal.write(
            Phase.COPYING, role='source', migration=self.progress.migration,
            paused=self._paused, endpoint=dataclasses.asdict(self._endpoint))
        with self.progress.timed('connect'):
            self._control = protocol.Control(self._connect('control'))
            self._control.on_abort = lambda reason: self._abort.set()
            st = self._item.st
            self._control.send(
                'begin', spec=st.spec, base_id=st.base_id,
                created_at=st.created_at, run=st.run, paused=self._paused,
                strategy=self.progress.strategy, layer=self._layer().to_dict())
            faults.point('source.connected')
            self._there = layer_transfer.give(
                self._control, self._layers, self._item.spec.layer,
                lambda: self._connect('layer'), self._carry, self.progress)
            self.moment.drops = bool(self._there.get('overruns'))

    def _layer(self) -> layers.LayerInfo:
        """:raises ContainerError: ``layer_missing``"""
        return self._layers.require(self._item.spec.layer)

    def _carry(
        self, connection: channel.Connection, plain: socket.socket,
        stats: relay.Stats | None = None,
    ) -> relay.Relay:
        return relay.Relay(
            connection, plain, limiter=self._limiter, stats=stats).start()

    def copy(self) -> None:
        """Copy the files while the guest runs, until little is left."""
        self.progress.phase = Phase.COPYING
        if self._item.config_drive.exists():
            self._serve('drive', self._item.config_drive, None, True)
        self.link_aliases()
        for number in range(self._options.max_passes + _MORE_PASSES):
            self.check_abort()
            if self._force.is_set() and self._mark is not None:
                break
            if number >= self._options.max_passes and self._complete:
                break
            began = time.monotonic()
            self._pass(final=False)
            # One that did not come to its end says nothing of the next.
            if self._complete and time.monotonic() - began < _SHORT_PASS:
                break

    def _ahead(self) -> bool:
        """:raises ContainerError: ``unsupported``"""
        options = self._options
        if self._paused or self.lazy:
            return False
        return precopy.wanted(
            options.strategy, here=lambda: self._criu.check(precopy.FEATURE),
            there=bool(self._there.get('rounds')),
            memory=self._item.cgroup.usage().memory_bytes)

    def _send_ahead(self) -> None:
        """Send most of the memory, and once more what was written to files.
        """
        self._mount_memory()
        self._stack.callback(self._memory.unmount)
        self.progress.strategy = 'pre-copy'
        rounds = precopy.Rounds(self, self._options.max_downtime)
        with self.progress.timed('rounds'):
            self._parent = rounds.run()
        self.sent_ahead = self.progress.memory_sent = rounds.sent
        if self._parent is None:
            self.progress.strategy = 'stop-and-copy'
        self._pass(final=False)

    def _pass(self, final: bool,
              ready: channel.Connection | None = None) -> None:
        """One pass over the upper."""
        with self.progress.timed('final-pass' if final else 'passes'):
            self._mark = self._serve(
                'upper', self._item.disk.upper, self._mark, final, ready)
        self.progress.passes += 1
        faults.point('source.final-pass' if final else 'source.pass')

    def _serve(
        self, what: str, directory: pathlib.Path, since: sync.Mark | None,
        final: bool, ready: channel.Connection | None = None,
    ) -> sync.Mark:
        """Let the destination pull a directory; it is told which."""
        assert self._control is not None
        seq = self._seq + 1 if ready is None else self._upper_seq
        connection = ready or self._connect('upper')
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            # Both ends are the relay's from now on.
            pump = self._carry(connection, ours)
            stack.callback(pump.abort)
            with theirs:
                server = sync.serve(
                    directory, theirs, since=since, final=final)
            stack.callback(server.close)
            self._control.send('files', what=what, seq=seq, final=final)
            done = self._control.expect(
                'files', frozen.PASS_TIMEOUT, seq=seq)
        self.progress.disk_sent += int(done.get('bytes') or 0)
        self._complete = bool(done.get('complete', True))
        return server.mark

    def hand_over(self) -> None:
        """Freeze, dump, and commit. Tried again when the guest was in the
        middle of something that passes.
        """
        dumping.retried(
            self._item.uuid, self._dump, self._abort,
            final=lambda: self.committed)

    def _dump(self) -> None:
        self.check_abort()
        item = self._item
        pid = self._pid
        external = guest.external_mounts(pid, item.nodes)
        # Nothing of it is left for another try, which then dumps everything.
        parent, self._parent = self._parent, None
        with contextlib.ExitStack() as stack:
            # All that can be made before the freeze is made before it.
            self._mount_memory()
            stack.callback(self._memory.unmount)
            dump = frozen.Dump(self, stack, pid, external, parent)
            options = dumping.options(
                self._criu, item, self._memory.path, external, pid,
                track=dump.parent is not None, parent=dump.parent)
            if dump.lazy:
                options.lazy_pages = True
                config = dump.lazy_config()
                stack.callback(config.unlink, missing_ok=True)
                options.config_file = str(config)
            dump.start()
            try:
                self.moment.before(pid, self._paused)
            except BaseException:
                # A guest that is paused may have been let run meanwhile.
                self._thaw()
                raise
            began = time.monotonic()
            try:
                response = dump.session.request(
                    self._criu.rpc.DUMP, options, dump.notified,
                    # The last answer comes when the last page has gone.
                    lazy.LONGEST if dump.lazy else _CRIU_TIMEOUT)
            except BaseException as e:
                if not self.committed:
                    self._stays(dump)
                    raise
                LOG.error('instance %s: it has committed, and then: %s',
                          item.uuid, e)
                response = None
            if dump.lazy and response is not None and response.success:
                self.drain_pages()
            if self._gave:
                self._learn(dump)
            self.progress.steps['dump'] = time.monotonic() - began
            if response is None or not response.success:
                if self.committed:
                    # It was to kill what must not run here again.
                    LOG.error('instance %s: criu: %s', item.uuid,
                              response and response.cr_errmsg)
                    return
                self._thaw()
                dump.settle()
                raise criu.failed(
                    'the instance cannot be dumped', item.uuid, 'dump',
                    self._memory.path / 'criu.log', self._logs, response,
                    'Stop what is named, or migrate the instance cold')

    def _learn(self, dump: frozen.Dump) -> None:
        """After the commit, whatever went wrong here: where it runs.

        :raises ContainerError: here, as before; ``lost``: nowhere
        """
        try:
            dump.wait_running()
            if self.progress.phase != Phase.RUNNING:
                self.resolve()
                self.progress.phase = Phase.RUNNING
        except errors.ContainerError:
            self.committed = False
            self._stays(dump)
            raise
        except OSError as e:
            if self.progress.phase != Phase.RUNNING:
                raise
            LOG.warning('instance %s: it runs there: %s', self._item.uuid, e)

    def _stays(self, dump: frozen.Dump) -> None:
        """The guest will not run elsewhere: let it go on.

        :raises ContainerError: ``lost``: CRIU has begun to give its memory
            away, and what it does then with the processes is not sure
        """
        if dump.lazy and self._gave:
            self.close_pages()
            # What it traces does not end before it does.
            dump.session.kill()
            self._item.kill()
            raise errors.ContainerError(
                'lost', 'the instance was lost: the destination failed after '
                'the commit', uuid=self._item.uuid,
                remedy='Start it again: its disk is as it was then')
        self._thaw()

    def _mount_memory(self) -> None:
        self._memory.mount(images.size_of(self._item.spec.limits))

    @property
    def _pid(self) -> int:
        """Of the guest's init."""
        return int((self._item.st.run or {})['process']['pid'])

    def _thaw(self) -> None:
        """Whatever was tried: the guest is again as it was."""
        self.moment.given_up(self._pid)
        recovery.thaw(self._item, self._paused)

    @property
    def limiter(self) -> bandwidth.Bandwidth:
        return self._limiter

    @property
    def paused(self) -> bool:
        return self._paused

    def commit(self, dumped: dict[str, ty.Any]) -> None:
        """Give the right to run away. In CRIU's ``post-dump``: everything is
        dumped, nothing runs, and a refusal would let it run on.
        """
        assert self._control is not None
        with self.progress.timed('restore'):
            self._restorable = True
            self._control.send('dumped', **dumped)
            with contextlib.suppress(OSError, errors.ContainerError,
                                     nl_exceptions.NetlinkError):
                neighbours.forget(self._pid)
            # If this agent dies, CRIU gives up and lets the guest's sockets
            # go. They would acknowledge what the guest, which runs on the
            # destination, never gets.
            network_lock.block(self._pid)
            self._control.expect('ready', _RESTORE_TIMEOUT)
        faults.point('source.ready')
        with self._lock:
            # An abort that was accepted is obeyed, and none is accepted that
            # cannot be.
            self.check_abort()
            self._journal.write(
                Phase.COMMITTED, role='source',
                migration=self.progress.migration, paused=self._paused,
                endpoint=dataclasses.asdict(self._endpoint), lazy=self.lazy)
            self.committed = self._gave = True
            self.progress.phase = Phase.COMMITTED
        faults.point('source.committed')
        with contextlib.suppress(protocol.PeerGone):
            self._control.send('go')
        # While the kernel takes the namespace down, its lock goes before its
        # interfaces; what still comes then would be answered by a reset.
        self._item.hold_network(True, lenient=True)
        faults.point('source.go')

    def wait_running(self) -> None:
        """Wait until it runs on the destination.

        :raises ContainerError: the destination will never run it; it may run
            here again
        """
        assert self._control is not None
        with self.progress.timed('commit'):
            try:
                self._control.expect('running', frozen.ANSWER_TIMEOUT)
            except protocol.PeerFailed:
                # It says that it never ran there, and never will.
                self.committed = False
                raise
            except errors.ContainerError as e:
                # Whatever else it says lets nothing run here.
                LOG.warning(
                    'instance %s: committed, and the destination was lost: '
                    '%s; asking it', self._item.uuid, e)
                self.resolve()
        self.progress.phase = Phase.RUNNING
        faults.point('source.running')

    def resolve(self) -> None:
        """Ask the destination's journal until it answers. Never guess.

        :raises ContainerError: the destination will never run it; it may run
            here again
        """
        if not self.verdict.wait():
            self._journal.remove()
            self.committed = False
            raise errors.ContainerError(
                'aborted', 'the destination has given the instance up '
                'before it ran', uuid=self._item.uuid)

    # For the rounds

    @property
    def forced(self) -> bool:
        """Whether the guest is to be frozen now."""
        return self._force.is_set()

    @property
    def rpc(self) -> types.ModuleType:
        return self._criu.rpc

    def check_peer(self) -> None:
        """:raises ContainerError: the destination has given up"""
        assert self._control is not None
        if self._control.broken:
            raise self.reason(protocol.PeerGone(
                'network', 'the destination is gone'))

    def round_options(
        self, directory: pathlib.Path, parent: str | None
    ) -> ty.Any:
        return dumping.options(
            self._criu, self._item, directory,
            guest.external_mounts(self._pid, self._item.nodes), self._pid,
            track=True, parent=parent, freezer=self._item.cgroup.v2,
            timeout=standstill.SEIZE_TIMEOUT)

    def open_round(self, number: int) -> channel.Connection:
        """The connection for a round; the destination waits for it."""
        assert self._control is not None
        connection = self._connect(precopy.ROLE)
        self._control.send('memory', round=number, seq=self._seq)
        return connection

    def round_taken(self) -> None:
        """Wait until the destination has all of a round."""
        assert self._control is not None
        self._control.expect('memory', frozen.PASS_TIMEOUT)

    def criu_failed(
        self, directory: pathlib.Path, response: ty.Any
    ) -> errors.ContainerError:
        return criu.failed(
            'the memory cannot be dumped while the guest runs',
            self._item.uuid, 'pre-dump', directory / 'criu.log', self._logs,
            response, 'Migrate it by stop-and-copy')

    # For the dump

    def reason(self, broken: errors.ContainerError) -> errors.ContainerError:
        """What the destination says after a connection broke; else that."""
        assert self._control is not None
        try:
            self._control.receive(_REASON_TIMEOUT)
        except protocol.PeerGone:
            pass
        except errors.ContainerError as e:
            return e
        return broken

    def open_final(self) -> tuple[channel.Connection, channel.Connection]:
        """The connections of the freeze, opened before it."""
        files = self._connect('upper')
        self._upper_seq = self._seq
        return files, self._connect('images')

    def open_pages(self) -> socket.socket:
        """A socket for CRIU that leads to the destination's CRIU."""
        ours, theirs = socket.socketpair()
        self._pages = relay.Relay(
            self._connect('pages'), ours, limiter=self._limiter,
            idle_s=frozen.PASS_TIMEOUT).start()
        return theirs

    def drain_pages(self) -> None:
        """CRIU has sent its last word. The destination has lost the guest if
        it does not come, and what is limited in speed comes late.
        """
        if self._pages is not None and not self._pages.wait(_DRAIN_TIMEOUT):
            LOG.warning('instance %s: the destination does not close its '
                        'connection for pages', self._item.uuid)

    def close_pages(self) -> None:
        if self._pages is not None:
            self._pages.abort()

    def final_pass(self, connection: channel.Connection | None) -> None:
        self._pass(final=True, ready=connection)

    def link_aliases(self) -> None:
        """Names of a changed file that are only in the layer: overlayfs knows
        that they are one file by an index, which does not move.
        """
        sync_links.link_aliases(
            self._layer().root, self._item.root, self._item.disk.upper)

    def session(self, fds: dict[int, int]) -> criu.Session:
        return self._criu.session(fds=fds)

    @property
    def item(self) -> container.Container:
        return self._item

    @property
    def images(self) -> pathlib.Path:
        return self._memory.path
