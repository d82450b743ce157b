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

"""The image's layer, where only the source of a migration still has it.

It comes while the guest has not been touched: after "begin", before
"prepared".
"""

import collections.abc as cabc
import contextlib
import socket
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import layers
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import relay
from nova_pycontainer.runtime.migration import room
from nova_pycontainer.runtime.migration import sync

LOG = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 60.0
#: A whole layer, and as long again for one that another migration brings.
_TIMEOUT = 3600.0
_WAIT_TIMEOUT = 2 * _TIMEOUT

#: Makes a relay of a connection and a socket, at an end of the channel.
Carry = cabc.Callable[
    [channel.Connection, socket.socket, relay.Stats], relay.Relay]


def give(
    control: protocol.Control, store: layers.LayerStore, key: str,
    connect: cabc.Callable[[], channel.Connection], carry: Carry,
    progress: protocol.Progress,
) -> dict[str, ty.Any]:
    """The source: wait until the destination is prepared, and serve it the
    layer if it does not have it.

    :returns: what it says of itself
    :raises ContainerError: the destination cannot take the instance
    """
    timeout = _ANSWER_TIMEOUT
    with contextlib.ExitStack() as stack:
        while True:
            frame = control.receive(timeout, 'prepared')
            if frame['type'] == 'prepared':
                return frame
            if frame['type'] != 'layer':
                raise errors.ContainerError(
                    'invalid', f'the other host said {frame["type"]!r} '
                    "instead of 'prepared'")
            timeout = _WAIT_TIMEOUT
            if not frame.get('wanted'):
                continue
            if progress.layer_total:
                raise errors.ContainerError(
                    'invalid', 'the other host wants the layer twice')
            _serve(stack, control, store, key, connect, carry, progress)


def _serve(
    stack: contextlib.ExitStack, control: protocol.Control,
    store: layers.LayerStore, key: str,
    connect: cabc.Callable[[], channel.Connection], carry: Carry,
    progress: protocol.Progress,
) -> None:
    info = store.get(key)
    progress.layer_total = info.bytes if info else 0
    LOG.info('instance %s: the destination does not have its layer %s, of '
             '%d bytes; sending it', progress.uuid, key, progress.layer_total)
    connection = connect()
    ours, theirs = socket.socketpair()
    pump = carry(connection, ours, _counted(progress))
    stack.callback(pump.abort)
    with theirs:
        server = sync.serve_layer(store, key, theirs)
    stack.callback(server.close)
    faults.point('layer.serving')
    control.send('layer', seq=connection.hello.seq)


def _counted(progress: protocol.Progress) -> relay.Stats:
    def carried(count: int) -> None:
        progress.layer_sent += count

    return relay.Stats(carried)


def take(
    control: protocol.Control, store: layers.LayerStore, key: str,
    described: ty.Mapping[str, ty.Any] | None,
    connected: cabc.Callable[
        [int, relay.Stats], ty.ContextManager[socket.socket]],
    cancelled: cabc.Callable[[], bool], progress: protocol.Progress,
) -> None:
    """The destination: make sure that the layer is here.

    :param described: what the source has said of it
    :param connected: the socket that the connection with a number leads to
    :raises ContainerError: nothing of it is here
    """
    if store.get(key) is not None:
        return
    if described is None or described.get('key') != key:
        raise errors.ContainerError(
            'layer_missing', 'the layer of the image is not on the '
            'destination, and the source does not send it',
            remedy='Upload the image again, or upgrade nova-pycontainer on '
                   'the source')

    @contextlib.contextmanager
    def connection() -> cabc.Iterator[socket.socket]:
        control.send('layer', wanted=True)
        seq = int(control.expect('layer', _ANSWER_TIMEOUT)['seq'])
        with connected(seq, _counted(progress)) as sock:
            faults.point('layer.fetching')
            yield sock

    control.send('layer', wanted=False)
    size = described.get('bytes')
    progress.layer_total = size if isinstance(size, int) else 0
    with progress.timed('layer'), room.needed('the files of the image'):
        sync.fetch_layer(
            store, described, connection, timeout=_TIMEOUT,
            cancelled=lambda: cancelled() or control.broken)
