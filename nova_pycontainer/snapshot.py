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

"""Snapshots: from the agent's stream into an image in Glance.

The archive goes from the agent's socket straight into Glance's connection; no
copy of it is kept here.
"""

import time

from nova.compute import task_states
from nova import exception
from nova.image import glance
from oslo_log import log as logging

from nova_pycontainer import steps as driver_steps

LOG = logging.getLogger(__name__)

#: Seconds between two looks whether anybody still wants the image.
_LOOK_S = 5.0
#: Bytes in a piece. Glance's client asks for a MiB and makes one chunk of it
#: (RFC 9112, section 7.1), and uWSGI, below which Glance often runs, takes
#: none that large: its chunked-input-limit counts the chunk's header, too.
_PIECE = 64 << 10


def failure(reason):
    """Nova has no class for it: whatever it is ends the snapshot."""
    return exception.NovaException(reason)


class _Data:
    """What Glance's client reads.

    An exception in the middle makes the client break the connection off, and
    Glance forget what it has.
    """

    def __init__(self, stream, look):
        self._stream = stream
        self._look = look
        self._next_look = time.monotonic() + _LOOK_S

    def read(self, size=-1):
        if time.monotonic() >= self._next_look:
            self._look()
            self._next_look = time.monotonic() + _LOOK_S
        return self._stream.read(min(size, _PIECE) if size > 0 else _PIECE)


class Snapshotter:
    """Makes images of servers.

    :param client: client of the agent
    """

    def __init__(self, client):
        self._client = client
        self._api = glance.API()

    def snapshot(self, context, instance, image_id, update_task_state):
        """Fill an image with the root file system of a server.

        :raises nova.exception.ImageNotFound: somebody has deleted the image
        :raises nova.exception.InstanceNotFound: somebody has deleted the
            server
        :raises ContainerError: the agent's
        """
        image = self._api.get(context, image_id)

        def look():
            self._api.get(context, image_id)

        try:
            with driver_steps.Steps('snapshot', instance) as steps:
                update_task_state(task_state=task_states.IMAGE_PENDING_UPLOAD)
                with steps.step('copy'):
                    stream = self._client.snapshot(instance.uuid)
                with stream:
                    update_task_state(
                        task_state=task_states.IMAGE_UPLOADING,
                        expected_state=task_states.IMAGE_PENDING_UPLOAD)
                    with steps.step('upload'):
                        self._api.update(
                            context, image_id, _metadata(instance, image),
                            _Data(stream, look), purge_props=False)
                steps.success()
        except (exception.ImageNotFound,
                exception.UnexpectedDeletingTaskStateError):
            raise
        except Exception as e:
            LOG.info('The snapshot failed: %s', e, instance=instance)
            # The reason may be that one of the two is gone, whatever broke
            # first.
            self._client.info(instance.uuid)
            try:
                look()
            except exception.ImageNotFound:
                raise
            except Exception as worse:
                LOG.info('Glance does not answer: %s', worse)
            raise e


def _metadata(instance, image):
    properties = {
        'image_location': 'snapshot',
        'image_state': 'available',
        'owner_id': instance.project_id,
    }
    if instance.os_type:
        properties['os_type'] = instance.os_type
    return {
        'name': image['name'],
        'status': 'active',
        # A root tarball, whatever the image was that the server came from.
        'disk_format': 'raw',
        'container_format': 'bare',
        'properties': properties,
    }
