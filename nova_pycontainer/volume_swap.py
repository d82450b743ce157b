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

"""Cinder moves a volume that a server has to another storage.

Nova asks for it in Cinder's name (``update_volume_attachment``), holds the
server's lock until it is done, and tells Cinder how it ended.
"""

import time

from nova import exception
from nova.i18n import _
from nova.volume import cinder
from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer import steps
from nova_pycontainer import volume

LOG = logging.getLogger(__name__)

_POLL_S = 0.5
#: Seconds without a byte, or without an agent, after which it has failed.
_STALL_S = 300.0


def failure(reason):
    """What Nova's libvirt driver raises; any exception ends it."""
    return exception.VolumeRebaseFailed(reason=reason)


class Swapper:
    """Puts volumes in the place of others.

    :param client: client of the agent
    :param volumes: the volumes of this host
    """

    def __init__(self, client, volumes):
        self._client = client
        self._volumes = volumes
        self._api = cinder.API()

    def swap(self, context, old_info, new_info, instance, mountpoint):
        """Put one volume in the place of another, with its data.

        :raises nova.exception.NovaException: the server has the old one
        :raises ContainerError: the same, of the agent's
        """
        ident = volume.volume_id(old_info)
        if ((self._client.info(instance.uuid).get('root') or {}).get('id') ==
                ident):
            raise exception.InvalidVolume(
                reason=_('the root of a container cannot be replaced while it '
                         'is mounted. Migrate the volume while the server is '
                         'shelved'))
        with self._volumes.connecting(instance), steps.Steps(
                'swap_volume', instance) as made:
            with made.step('connect', lambda: self._volumes.disconnect(
                    new_info, instance)):
                new = self._volumes.connect(
                    context, new_info, mountpoint, instance)
            with made.step('copy'):
                # As Cinder calls it afterwards.
                self._client.volume_swap(instance.uuid, ident, {
                    **new, 'id': self._name_of(context, ident, new['id'])})
                self._wait(instance, new)
            made.success()
        try:
            self._volumes.disconnect(old_info, instance, replaced=True)
        except (exception.NovaException, errors.ContainerError) as e:
            # It is done: who says that it failed would lose the data.
            LOG.error('%s', e, instance=instance)

    def _name_of(self, context, old, new):
        """The id that a volume will have: one that Cinder migrates keeps it.
        """
        status = self._api.get(context, old).get('migration_status')
        return old if status == 'migrating' else new

    def _wait(self, instance, new):
        """:raises ContainerError: the server has the old volume"""
        seen, since, aborted = -1, time.monotonic(), False
        while True:
            copied = seen
            try:
                status = self._client.volume_swap_status(instance.uuid)
                if status['phase'] == 'completed':
                    return
                if status['phase'] == 'failed':
                    raise errors.ContainerError.from_dict(status['error'])
                copied = status['copied_bytes']
            except errors.AgentUnavailable as e:
                if time.monotonic() - since > _STALL_S:
                    raise
                LOG.warning('%s', e, instance=instance)
            except errors.ContainerError as e:
                if e.code != 'not_found':
                    raise
                # The agent was restarted.
                if self._has(instance, new):
                    return
                raise errors.ContainerError(
                    'aborted', 'the copying ended with the agent',
                    uuid=instance.uuid, remedy='Migrate the volume again'
                ) from e
            if copied != seen:
                seen, since = copied, time.monotonic()
            elif time.monotonic() - since > _STALL_S:
                if aborted:
                    raise errors.ContainerError(
                        'timeout', 'no byte of the volume was copied for '
                        f'{_STALL_S:.0f} s, and the copying does not end',
                        uuid=instance.uuid,
                        remedy='See whether the storage answers')
                self._client.volume_swap_abort(instance.uuid)
                since, aborted = time.monotonic(), True
            time.sleep(_POLL_S)

    def _has(self, instance, new):
        return any(v['path'] == new['path'] for v in
                   self._client.info(instance.uuid)['volumes'])
