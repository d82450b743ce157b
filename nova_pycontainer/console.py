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

"""The console: its log, and the way to it."""

from nova.console import type as console_type
from nova import exception

from nova_pycontainer.runtime import errors

#: As much as the libvirt driver shows (MAX_CONSOLE_BYTES).
MAX_BYTES = 100 * 1024


def output(client, instance):
    """Return the end of what the guest has written to its console.

    It is there whether or not the container runs.

    :returns: bytes; Nova would encode a str as Latin-1 and fail on the rest
    """
    return client.console_log(instance.uuid, MAX_BYTES)


def serial(client, instance, conf):
    """Return how nova-serialproxy reaches the console.

    :param conf: the options of ``[serial_console]``
    :raises nova.exception.InstanceNotReady: it does not run
    :raises ContainerError: the agent's
    """
    try:
        token = client.console_token(instance.uuid)
    except errors.ContainerError as e:
        if e.code != 'bad_state':
            raise
        raise exception.InstanceNotReady(instance_id=instance.uuid) from e
    return console_type.ConsoleSerial(
        host=conf.proxyclient_address, port=token['port'],
        internal_access_path=token['path'])
