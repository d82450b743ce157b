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

"""Waiting for the files of a server that comes from another host."""

import time

from nova import exception
from nova.i18n import _
from oslo_log import log as logging

from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

_POLL_S = 10.0
_RETRY_S = 1.0


def wait(client, conf, instance, migration):
    """Wait for the end of a copy, which takes as long as it takes.

    :param migration: its uuid
    :raises nova.exception.MigrationError: the agent was restarted
    :raises ContainerError: why it failed
    """
    lost = None
    while True:
        try:
            status = client.migration_status(migration, _POLL_S)
        except errors.AgentUnavailable as e:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > conf.agent_start_timeout:
                raise
            LOG.warning('%s', e, instance=instance)
            time.sleep(_RETRY_S)
            continue
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            raise exception.MigrationError(reason=_(
                'the agent was restarted while it copied the server. Reboot '
                'it hard, which tries it again')) from e
        lost = None
        if status['phase'] == 'completed':
            LOG.info('The server has come: %s', status, instance=instance)
            return
        if status['phase'] in ('failed', 'aborted'):
            raise errors.ContainerError.from_dict(status['error'])
