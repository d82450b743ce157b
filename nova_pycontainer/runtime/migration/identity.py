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

"""Which key and certificate this host has: its own, or an operator's."""

import socket

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import keys


def load(config: rconfig.Config) -> keys.Identity:
    """:raises ContainerError: ``invalid``, ``forbidden``"""
    files = (config.migration_ca, config.migration_cert,
             config.migration_key)
    if not any(files):
        return keys.Identity.load_or_create(
            config.state_dir / 'keys', socket.gethostname())
    if not all(files):
        raise errors.ContainerError(
            'invalid', 'migration_ca, migration_cert and migration_key '
            'go together', remedy='Set all three, or none')
    return keys.Identity.load_operator(*map(str, files))


def unnamed(config: rconfig.Config, found: keys.Identity) -> str | None:
    """Why other hosts would not take an operator's certificate for ours.

    They know this host by its address and by its name.
    """
    if found.ca is None:
        return None
    # As they check it.
    return found.check(keys.der(found.certificate), keys.Peer(None, (
        config.migration_address, socket.gethostname())))
