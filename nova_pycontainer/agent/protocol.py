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

"""What agent and client must agree about: HTTP/1.1 over a unix socket.

=====================================  ======================================
``POST /v1/<verb>``                    parameters and result as JSON
``PUT /v1/layers/<key>``               an image as the body, chunked
``GET /v1/snapshots/<uuid>``           answered by a root file system as a tar
                                       archive, chunked; without the last
                                       chunk it is not all of it
``POST /v1/console_attach``            ``Upgrade: raw``; answered by 101, and
                                       from then on raw bytes both ways
=====================================  ======================================

An answer is ``{"result": ...}`` with status 200, or ``{"error": {...}}`` with
the fields of :class:`nova_pycontainer.runtime.errors.ContainerError`. Bytes
are ``{"$base64": "..."}``. A connection carries one request.
"""

import base64
import binascii
import dataclasses
import json
import select
import socket
import typing as ty

from nova_pycontainer.runtime import errors

VERSION: ty.Final = 1
PREFIX: ty.Final = '/v1/'
LAYERS: ty.Final = '/v1/layers/'
SNAPSHOTS: ty.Final = '/v1/snapshots/'

#: In every request and every answer, and compared by both sides.
VERSION_HEADER: ty.Final = 'X-Pycontainer-Protocol'
#: Seconds that the client gives the agent for the whole of a verb.
LIMIT_HEADER: ty.Final = 'X-Pycontainer-Timeout'

#: Seconds that the client waits beyond what it gave the agent. Only an agent
#: that hangs does not answer within them.
GRACE: ty.Final = 10.0
#: Seconds without any data after which an image's transfer is given up.
STREAM_IDLE: ty.Final = 300.0
#: Seconds until the first byte of a snapshot: all that the guest has written
#: is copied before it.
SNAPSHOT_LIMIT: ty.Final = 7200.0
#: Longest wait for an event, in seconds.
MAX_POLL: ty.Final = 300.0

_BYTES: ty.Final = '$base64'


def check_version(found: str | None, us: str, them: str) -> None:
    """:raises ContainerError: ``unsupported``"""
    if found != str(VERSION):
        raise errors.ContainerError(
            'unsupported',
            f'the {us} speaks version {VERSION} of the protocol and the '
            f'{them} version {found or "none"}',
            remedy='Install the same release of nova-pycontainer for both, '
                   'and restart both')


def dumps(value: object) -> bytes:
    return json.dumps(value, default=_default).encode()


def _default(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return {_BYTES: base64.b64encode(value).decode()}
    if hasattr(value, 'to_dict'):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name)
                for field in dataclasses.fields(value)}
    raise TypeError(f'{type(value)} cannot go over the socket')


def loads(data: bytes) -> ty.Any:
    """:raises ValueError: not JSON, or not nested sanely"""
    try:
        return json.loads(
            data, object_hook=_hook, parse_constant=_no_constant)
    except RecursionError as e:
        raise ValueError('nested too deeply') from e


def _no_constant(text: str) -> ty.NoReturn:
    # Python reads and compares these; JSON has no such numbers.
    raise ValueError(f'{text} is no number')


def _hook(value: dict[str, ty.Any]) -> object:
    if value.keys() == {_BYTES} and isinstance(value[_BYTES], str):
        try:
            return base64.b64decode(value[_BYTES], validate=True)
        except binascii.Error as e:
            raise ValueError('not base64') from e
    return value


def readable(sock: socket.socket) -> bool:
    """Whether there is something to read, or the end, without waiting."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def internal(cause: object) -> errors.ContainerError:
    """What nobody has foreseen, without telling the client too much."""
    if isinstance(cause, OSError) and cause.errno in errors.FULL:
        return errors.ContainerError(
            'no_space', 'the disk of the host is full', cause=cause.strerror,
            remedy='Free space there, above all in the state directory of '
            'pycontainer-agent, and try again')
    return errors.ContainerError(
        'internal', 'the agent failed', cause=repr(cause),
        remedy='See the log of pycontainer-agent on that host')
