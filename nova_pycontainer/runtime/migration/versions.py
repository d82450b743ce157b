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

"""Whether an instance can go from one host to another, by their releases.

Both have to speak the same protocol. And an instance goes to a host of its own
host's format of the state or of a later one only: hosts are upgraded one after
the other, and those that are not yet can be emptied onto those that are.
"""

import socket
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime import state

#: Of hosts that do not tell theirs.
_UNTOLD = 3


def difference(
    theirs: object, them: str, ours: int, us: str = ''
) -> tuple[str, str] | None:
    """What keeps two hosts from understanding each other, and the remedy.

    :param theirs: the version of the other host, whatever it has sent
    :param them: the other host, in a sentence
    """
    if type(theirs) is int and theirs == ours:
        return None
    us = us or socket.gethostname()
    older = them if type(theirs) is not int or theirs < ours else us
    return (
        f'{them} speaks version {ascii(theirs)[:20]} of the migration '
        f'protocol, {us} speaks version {ours}',
        f'Upgrade nova-pycontainer on {older}, and restart nova-compute and '
        'pycontainer-agent there')


def own() -> dict[str, ty.Any]:
    """What others have to know of this host."""
    return {'protocol': protocol.VERSION, 'state_format': state.FORMAT,
            'hostname': socket.gethostname()}


def told(facts: ty.Mapping[str, ty.Any]) -> dict[str, ty.Any]:
    """What of it has to go through Nova, if it is there."""
    return {key: facts[key] for key in ('state_format', 'hostname')
            if key in facts}


def format_of(facts: ty.Mapping[str, ty.Any]) -> object:
    """The format that a host keeps instances in, by its :func:`own`."""
    return facts.get('state_format', _UNTOLD)


def of(facts: ty.Mapping[str, ty.Any], role: str) -> tuple[str, str] | None:
    """Why an instance cannot come from, or go to, a host that has sent its
    :func:`own`; and the remedy.

    :param role: what it is to us, ``source`` or ``destination``
    """
    them = str(facts.get('hostname') or f'the {role}')
    us = socket.gethostname()
    theirs = format_of(facts)
    found = difference(facts.get('protocol'), them, protocol.VERSION)
    if found is not None:
        return found
    if role == 'source':
        return too_new(theirs, them, state.FORMAT, us)
    return too_new(state.FORMAT, us, theirs, them)


def too_new(
    source: object, source_name: str, destination: object,
    destination_name: str,
) -> tuple[str, str] | None:
    """Whether an instance would go to a former release, and the remedy.

    :param source: format of its state, whatever the other host has sent
    """
    if (type(source) is int and type(destination) is int and
            source <= destination):
        return None
    return (
        f'{source_name} keeps instances in format {ascii(source)[:20]}, '
        f'{destination_name} in format {ascii(destination)[:20]}, so that it '
        'does not know all that an instance may have',
        f'Upgrade nova-pycontainer on {destination_name} first, and restart '
        'pycontainer-agent and nova-compute there')


def check(facts: ty.Mapping[str, ty.Any], role: str) -> None:
    """As :func:`of`.

    :raises ContainerError: ``unsupported``
    """
    found = of(facts, role)
    if found is not None:
        raise errors.ContainerError(
            'unsupported', found[0], remedy=found[1])
