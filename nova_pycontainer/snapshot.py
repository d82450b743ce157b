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

import contextlib
import time

from nova.compute import task_states
from nova import exception
from nova.image import glance
from oslo_log import log as logging

from nova_pycontainer import steps as driver_steps

LOG = logging.getLogger(__name__)

#: Seconds between two looks whether anybody still wants the image, and two
#: words on how far it is.
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
        """
        :param look: called every few seconds with how many bytes were read
        """
        self._stream = stream
        self._look = look
        self._count = 0
        self._next_look = time.monotonic() + _LOOK_S

    def read(self, size=-1):
        if time.monotonic() >= self._next_look:
            self._look(self._count)
            self._next_look = time.monotonic() + _LOOK_S
        data = self._stream.read(min(size, _PIECE) if size > 0 else _PIECE)
        self._count += len(data)
        return data


class _Progress:
    """``progress`` of a server, in percent of the image that is uploaded.

    The archive is made while it is read, so that its size is a guess: what the
    server's image and the server itself have written. It is 0 when there is
    no upload, as everybody leaves it whose server is active.
    """

    def __init__(self, client, instance):
        self._instance = instance
        info = client.info(instance.uuid)
        self._bytes = (info['disk']['used_bytes'] or 0) + sum(
            layer['bytes'] for layer in client.layer_list()
            if layer['key'] == info['layer'])

    def tell(self, count):
        """:raises nova.exception.InstanceNotFound: it is deleted"""
        # Never all of it: what Glance does with the last byte takes time.
        percent = min(99, 100 * count // max(self._bytes, 1))
        if percent != self._instance.progress:
            self._instance.progress = percent
            self._instance.save()

    def close(self):
        if self._instance.progress:
            self._instance.progress = 0
            with contextlib.suppress(exception.InstanceNotFound):
                self._instance.save()


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

        def look_and_tell(count):
            look()
            progress.tell(count)

        try:
            with driver_steps.Steps('snapshot', instance) as steps:
                update_task_state(task_state=task_states.IMAGE_PENDING_UPLOAD)
                with steps.step('copy'):
                    progress = _Progress(self._client, instance)
                    stream = self._client.snapshot(instance.uuid)
                with stream, contextlib.closing(progress):
                    update_task_state(
                        task_state=task_states.IMAGE_UPLOADING,
                        expected_state=task_states.IMAGE_PENDING_UPLOAD)
                    with steps.step('upload'):
                        self._api.update(
                            context, image_id, _metadata(instance, image),
                            _Data(stream, look_and_tell), purge_props=False)
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
