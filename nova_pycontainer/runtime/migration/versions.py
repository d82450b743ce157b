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

"""Whether two hosts speak the same protocol, and else which one is older."""

import socket
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import protocol


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
    return {'protocol': protocol.VERSION, 'hostname': socket.gethostname()}


def of(facts: ty.Mapping[str, ty.Any], role: str) -> tuple[str, str] | None:
    """The difference to a host that has sent its :func:`own`.

    :param role: what it is to us
    """
    return difference(facts.get('protocol'), str(
        facts.get('hostname') or f'the {role}'), protocol.VERSION)


def check(facts: ty.Mapping[str, ty.Any], role: str) -> None:
    """:raises ContainerError: ``unsupported``"""
    found = of(facts, role)
    if found is not None:
        raise errors.ContainerError(
            'unsupported', found[0], remedy=found[1])
