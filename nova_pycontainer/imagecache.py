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

"""The layers of images that no container needs any more."""

import time

from oslo_log import log as logging

from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)


class ImageCache:
    """Deletes layers that nothing has used for long enough.

    How long that is, is Nova's option
    ``[image_cache]remove_unused_original_minimum_age_seconds``. A layer's
    time without use is known since this service began; a restart begins to
    count anew, and deletes nothing too early.

    :param client: client of the agent
    :param conf: the options of ``[image_cache]``
    :param clock: seconds since the epoch
    """

    def __init__(self, client, conf, clock=time.time):
        self._client = client
        self._conf = conf
        self._clock = clock
        self._unused_since = {}

    def manage(self):
        """Nova's periodic task.

        :raises ContainerError: the agent's
        """
        if not self._conf.remove_unused_base_images:
            return
        now = self._clock()
        used = {info['layer'] for info in self._client.list()}
        unused = [layer for layer in self._client.layer_list()
                  if layer['key'] not in used]
        self._unused_since = {
            layer['key']: self._unused_since.get(layer['key'], now)
            for layer in unused}
        age = self._conf.remove_unused_original_minimum_age_seconds
        for layer in unused:
            key = layer['key']
            since = max(self._unused_since[key], layer['created_at'])
            if now - since < age:
                continue
            try:
                self._client.layer_delete(key)
            except errors.ContainerError as e:
                if e.code != 'layer_in_use':
                    raise
                # A container has come in the meantime.
                continue
            self._unused_since.pop(key)
            LOG.info('Deleted the layer of image %(image)s, which nothing '
                     'has used for %(age)d s; it took %(mib)d MiB',
                     {'image': layer['image'], 'age': now - since,
                      'mib': layer['bytes'] >> 20})
