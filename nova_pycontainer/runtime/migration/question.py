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

"""One agent asks the other how far a migration is there."""

import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import protocol

LOG = logging.getLogger(__name__)

Phase = protocol.Phase

_CONNECT_TIMEOUT = 20.0
_ANSWER_TIMEOUT = 60.0
_RETRY = 2.0
#: Seconds.
_CALL_OFF_S = 600.0

#: Sequence numbers of questions: above all of a migration's own connections.
QUESTION = 1 << 20


def peer(facts: ty.Mapping[str, ty.Any]) -> keys.Peer:
    """Whom to expect, by what was announced of a host."""
    return keys.Peer(str(facts['certificate']), tuple(
        str(facts[name]) for name in ('address', 'hostname')
        if facts.get(name)))


def ask(
    identity: keys.Identity, endpoint: ty.Mapping[str, ty.Any],
    migration: str, uuid: str, phase: Phase,
) -> Phase:
    """Ask a destination how far it is, and tell how far the source is.

    A destination that waits for "go" takes :attr:`Phase.COMMITTED` for it,
    and gives up for :attr:`Phase.ABORTED`.

    :raises ContainerError: it cannot be reached
    """
    connection = channel.connect(
        str(endpoint['address']), int(endpoint['port']), identity,
        peer(endpoint),
        # Never used twice, over restarts too.
        channel.Hello(migration, uuid, 'control', QUESTION + int(
            time.time() * 100) % (1 << 29)), _CONNECT_TIMEOUT)
    control = protocol.Control(connection)
    try:
        control.send('query', phase=phase)
        return Phase(control.expect('phase', _ANSWER_TIMEOUT)['phase'])
    finally:
        control.close()


def check_silent(
    identity: keys.Identity, endpoint: ty.Mapping[str, ty.Any],
    migration: str, uuid: str,
) -> None:
    """Whether the agent of a source is gone.

    :raises ContainerError: ``bad_state``: it answers, whatever it says
    """
    try:
        ask(identity, endpoint, migration, uuid, Phase.READY)
    except errors.ContainerError as e:
        if e.code in ('network', 'timeout'):
            return
    raise errors.ContainerError(
        'bad_state', 'the agent of the source is there, and settles it',
        uuid=uuid, remedy='See what "pycontainer show" says of it there')


def call_off(
    identity: keys.Identity, endpoint: ty.Mapping[str, ty.Any],
    migration: str, uuid: str,
) -> None:
    """Tell a destination until it has heard it that nothing will come."""
    if not tell(identity, endpoint, migration, uuid, Phase.ABORTED,
                _CALL_OFF_S):
        LOG.error('instance %s: the destination could not be told that '
                  'migration %s is off; roll it back there', uuid, migration)


def tell(
    identity: keys.Identity, endpoint: ty.Mapping[str, ty.Any],
    migration: str, uuid: str, phase: Phase, limit_s: float,
) -> bool:
    """Tell a destination, which may wait for it, how it has ended here.

    :param limit_s: seconds to try
    :returns: whether it has heard it, or knows of no such migration
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            theirs = ask(identity, endpoint, migration, uuid, phase)
            if phase == Phase.ABORTED and theirs in (
                    Phase.RUNNING, Phase.COMPLETED):
                # Only if a human has said that it would not.
                LOG.error('instance %s runs on the destination of migration '
                          '%s too: delete one of them', uuid, migration)
            if theirs != Phase.READY:
                return True
        except errors.ContainerError as e:
            if e.code == 'forbidden':
                # It does not know of this migration any more.
                return True
        except OSError:
            pass
        time.sleep(_RETRY)
    return False
