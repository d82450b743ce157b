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

"""The files of a container that is down, on their way to another host.

The source *offers* them (:class:`Offer`) and the destination *takes* them
(:class:`Taking`), over the same channel as live migrations, which one goes
the other way: here the destination connects, because Nova tells it last.

On the control connection it says ``files`` with the number of the connection
at which it wants to read them, or ``log``, which is answered, and at last
``end``. The source answers an error with ``failed`` at any time.
"""

import collections.abc as cabc
import contextlib
import pathlib
import socket
import threading
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import console_log
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import layers
from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import relay
from nova_pycontainer.runtime.migration import room
from nova_pycontainer.runtime.migration import sync
from nova_pycontainer.runtime.migration import sync_links
from nova_pycontainer.runtime import unpack_client

LOG = logging.getLogger(__name__)

Phase = protocol.Phase

#: Connections that an offer takes.
ROLES: ty.Final = ('control', 'upper', 'layer', 'facts')

_DATA_TIMEOUT = 60.0
_ANSWER_TIMEOUT = 60.0
#: Until the next thing is asked for: a layer may be on its way by another
#: migration.
_NEXT_TIMEOUT = 7200.0
_PASS_TIMEOUT = 6 * 3600.0
#: For the source to say why it has hung up.
_REASON_TIMEOUT = 2.0
_FILES = 'the files of the guest'


class Offer:
    """The source of one container.

    :param facts: what a destination has to know of it
    """

    #: Of an interface that sources and destinations have in common.
    asked = committed = False

    def __init__(
        self, item: container.Container, store: layers.LayerStore,
        facts: dict[str, ty.Any], progress: protocol.Progress,
        rate: int | None = None,
    ) -> None:
        self._item = item
        self._layers = store
        self._facts = facts
        self._limiter = bandwidth.Bandwidth(rate)
        self._data: dict[tuple[str, int], channel.Connection] = {}
        self._arrived = threading.Condition()
        #: Who reads is alone, and has the disk mounted.
        self._reading = threading.Lock()
        self._over = False
        #: Control connections that go on.
        self._readers = 0
        self._control: protocol.Control | None = None
        self._pump: relay.Relay | None = None
        self.progress = progress

    def connected(self, connection: channel.Connection) -> None:
        """A connection has come in, authenticated and for this container."""
        role, seq = connection.hello.role, connection.hello.seq
        if role == 'facts':
            threading.Thread(
                target=self._tell, args=(connection,), daemon=True,
                name=f'facts-{self._item.uuid[:8]}').start()
            return
        with self._arrived:
            if role == 'control':
                self._readers += 1
            elif self._readers:
                self._data[role, seq] = connection
                self._arrived.notify_all()
                return
        if role != 'control':
            # Who would serve it has failed meanwhile.
            connection.close()
            return
        threading.Thread(
            target=self._run, args=(connection,), daemon=True,
            name=f'offer-{self._item.uuid[:8]}').start()

    def _tell(self, connection: channel.Connection) -> None:
        control = protocol.Control(connection)
        try:
            control.send('facts', facts=self._facts)
            # It hangs up when it has them.
            control.receive(_ANSWER_TIMEOUT)
        except errors.ContainerError as e:
            LOG.debug('%s', e)
        finally:
            control.close()

    def _reader_ends(self) -> None:
        with self._arrived:
            self._readers -= 1
            if self._readers:
                return
            unused = [*self._data.values()]
            self._data.clear()
        for connection in unused:
            connection.close()

    def abort(self, reason: str) -> None:
        """End it: nothing is read any more when this returns."""
        self._over = True
        with self._arrived:
            self._arrived.notify_all()
        control, pump = self._control, self._pump
        if control is not None:
            control.cancel(reason)
        if pump is not None:
            pump.abort()
        with self._reading:
            pass

    def _run(self, connection: channel.Connection) -> None:
        control = protocol.Control(connection)
        try:
            # The first look at a large layer takes long.
            if self._item.spec.layer:
                sync_links.layer_groups(
                    self._layers.require(self._item.spec.layer).root)
            with self._reading:
                self._control = control
                try:
                    self._check()
                    self._serve(control)
                finally:
                    self._control = None
        except BaseException as e:
            error = errors.ContainerError.of(
                e, 'the source of the files failed', self._item.uuid)
            LOG.warning('instance %s: its files cannot be read by another '
                        'host: %s', self._item.uuid, error)
            with contextlib.suppress(errors.ContainerError):
                control.send('failed', error=error.to_dict())
        finally:
            self._reader_ends()
            control.close()

    def _check(self) -> None:
        if self._over:
            raise errors.ContainerError(
                'aborted', 'the offer was withdrawn', uuid=self._item.uuid)

    def _serve(self, control: protocol.Control) -> None:
        item = self._item
        self.progress.phase = Phase.COPYING
        with contextlib.ExitStack() as stack:
            # A volume is the other host's already, and not to be touched.
            if not item.spec.root:
                self._mount(stack)
            faults.point('offer.mounted')
            while not self._over:
                frame = control.receive(_NEXT_TIMEOUT, 'files')
                if frame['type'] == 'files':
                    self._send(str(frame['what']), int(frame['seq']))
                elif frame['type'] == 'log':
                    control.send('log', data=console_log.pack(
                        item.log, item.log_bytes))
                elif frame['type'] == 'end':
                    return
                else:
                    raise errors.ContainerError(
                        'invalid', f'the destination said {frame["type"]!r}')

    def _mount(self, stack: contextlib.ExitStack) -> None:
        item = self._item
        layer = self._layers.require(item.spec.layer).root
        item.disk.mount()
        stack.callback(item.disk.unmount)
        item.mount_root(layer)
        stack.callback(item.unmount_root)
        sync_links.link_aliases(layer, item.root, item.disk.upper)
        # The copy is to be of what lies below.
        item.unmount_root()

    def _send(self, what: str, seq: int) -> None:
        item = self._item
        with self._arrived:
            key = ('layer' if what == 'layer' else 'upper', seq)
            if not self._arrived.wait_for(
                    lambda: key in self._data or self._over,
                    _DATA_TIMEOUT):
                raise errors.ContainerError(
                    'timeout', f'the connection {key} did not come')
            self._check()
            connection = self._data.pop(key)
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            self._pump = relay.relay(connection, ours, self._limiter)
            stack.callback(self._pump.abort)
            self._check()
            with theirs:
                if what == 'layer':
                    server = sync.serve_layer(
                        self._layers, item.spec.layer, theirs)
                else:
                    server = sync.serve(
                        {'upper': item.disk.upper,
                         'drive': item.config_drive}[what],
                        theirs, final=True)
            stack.callback(server.close)
            faults.point('offer.serving')
            self._pump.wait(_PASS_TIMEOUT)
            self.progress.disk_sent += self._pump.stats.sent


def ask(connection: channel.Connection) -> dict[str, ty.Any]:
    """What the source of an offer has told whoever asked for the offer.

    :param connection: of the role ``facts``
    """
    control = protocol.Control(connection)
    try:
        found = control.expect('facts', _ANSWER_TIMEOUT).get('facts')
    finally:
        control.close()
    if not isinstance(found, dict):
        raise errors.ContainerError(
            'invalid', 'the source does not describe the instance')
    return found


class Taking:
    """The destination of one container.

    :param item: it is defined: its directory, disk and id range are there
    :param connect: makes a connection for a role and with a number
    :param layer: what the source has said of the layer, should it be needed
    :param drive: whether there is a config drive
    """

    asked = committed = False

    def __init__(
        self, item: container.Container, store: layers.LayerStore,
        connect: cabc.Callable[[str, int], channel.Connection],
        layer: ty.Mapping[str, ty.Any], drive: bool,
        progress: protocol.Progress, rate: int | None = None,
    ) -> None:
        self._item = item
        self._layers = store
        self._connect = connect
        self._layer = layer
        self._drive = drive
        self._limiter = bandwidth.Bandwidth(rate)
        self._seq = 0
        self._abort = threading.Event()
        self._control: protocol.Control | None = None
        self._pump: relay.Relay | None = None
        self.progress = progress

    def connected(self, connection: channel.Connection) -> None:
        """Nobody connects to a destination."""
        connection.close()

    def abort(self, reason: str) -> None:
        """Ask for the end."""
        self._abort.set()
        control, pump = self._control, self._pump
        if control is not None:
            control.cancel(reason)
        if pump is not None:
            pump.abort()

    def run(self) -> None:
        """Copy all.

        :raises ContainerError: what is here is of no use
        """
        item = self._item
        self.progress.phase = Phase.COPYING
        self._control = control = protocol.Control(
            self._connect('control', 0))
        try:
            with contextlib.ExitStack() as stack:
                faults.point('taking.connected')
                places = [item.directory]
                if not item.spec.root:
                    self._fetch_layer()
                    item.disk.mount()
                    stack.callback(item.disk.unmount)
                    self._fetch('upper', item.disk.upper)
                    places.append(item.disk.upper)
                faults.point('taking.files')
                if self._drive:
                    item.config_drive.mkdir(mode=0o755, exist_ok=True)
                    self._fetch('drive', item.config_drive)
                control.send('log')
                console_log.unpack(
                    item.log, control.expect('log', _ANSWER_TIMEOUT)['data'],
                    item.log_bytes)
                # Whoever hears of the end may delete the source's.
                for directory in places:
                    unpack_client.sync_filesystem(directory)
                faults.point('taking.written')
            control.send('end')
        except BaseException as e:
            self._why(control, e)
            raise
        finally:
            control.close()

    def _why(self, control: protocol.Control, error: BaseException) -> None:
        """:raises ContainerError: the reason, if it is another one"""
        if self._abort.is_set():
            raise errors.ContainerError(
                'aborted', 'the migration was aborted') from error
        if isinstance(error, errors.ContainerError) and (
                error.code in ('network', 'internal', 'timeout')):
            # The source says why it has hung up.
            try:
                control.receive(_REASON_TIMEOUT)
            except protocol.PeerGone:
                pass

    def _fetch_layer(self) -> None:
        size = self._layer.get('bytes')
        self.progress.layer_total = size if isinstance(size, int) else 0
        if self._layers.get(self._item.spec.layer) is not None:
            return
        with self.progress.timed('layer'), (
                room.needed('the files of the image')):
            sync.fetch_layer(
                self._layers, self._layer,
                lambda: self._socket('layer', self._count_layer),
                cancelled=self._abort.is_set)

    def _count_layer(self, count: int) -> None:
        self.progress.layer_sent += count

    def _fetch(self, what: str, directory: pathlib.Path) -> None:
        with self.progress.timed(what), (
                room.needed(_FILES, self._item.directory)), (
                self._socket(what)) as sock:
            stats = sync.fetch(
                sock, directory, final=True, timeout=_PASS_TIMEOUT)
        self.progress.disk_sent += stats.received
        room.check_written(_FILES, self._item.disk, self._item.directory)

    @contextlib.contextmanager
    def _socket(
        self, what: str,
        carried: cabc.Callable[[int], None] = lambda count: None,
    ) -> cabc.Iterator[socket.socket]:
        """A socket at which the source serves what it is asked for."""
        assert self._control is not None
        self._seq += 1
        connection = self._connect(
            'layer' if what == 'layer' else 'upper', self._seq)
        ours, theirs = socket.socketpair()
        with theirs:
            self._pump = relay.relay(
                connection, ours, self._limiter, relay.Stats(carried))
            try:
                if self._abort.is_set():
                    raise errors.ContainerError(
                        'aborted', 'the migration was aborted')
                self._control.send(
                    'files', what=what, seq=connection.hello.seq)
                yield theirs
            finally:
                self._pump.abort()
