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

"""Glance that keeps what is uploaded to it; Nova's fixture does not."""

import copy
import hashlib

from nova import exception

_PIECE = 1 << 16


class Store:
    """Makes a fixture of Nova's keep images as Glance does.

    :ivar uploading: called with the image's id when the first piece of its
        data has come
    :ivar took: called with the image's id after each piece
    """

    def __init__(self, glance):
        self._glance = glance
        self._create, self._update = glance.create, glance.update
        self.uploading = self.took = None
        glance.create, glance.update = self.create, self.update
        glance.detail = self.detail

    def create(self, context, metadata, data=None):
        if data is None:
            # Nova uploads the nothing of an image that names snapshots of
            # volumes, and so makes it active.
            metadata.setdefault('status', (
                'active' if str(metadata.get('size')) == '0' else 'queued'))
        return self._create(context, metadata, data)

    def update(self, context, image_id, metadata, data=None,
               purge_props=False):
        # The status is Glance's own to change.
        metadata = {k: v for k, v in metadata.items() if k != 'status'}
        status = self._glance.images.get(image_id, {}).get('status')
        self._update(context, image_id, metadata, None, purge_props)
        self._glance.images[image_id].setdefault('status', status)
        if data is not None:
            self._upload(image_id, data)
        return self._glance.show(context, image_id)

    def detail(self, context, filters=None, **kwargs):
        """The newest first, as those who ask want it."""
        wanted = {
            key.removeprefix('property-'): value
            for key, value in (filters or {}).items()}
        return [copy.deepcopy(image) for image in reversed(
            self._glance.images.values())
            if wanted.items() <= image['properties'].items()]

    def _upload(self, image_id, data):
        image = self._glance.images[image_id]
        image['status'] = 'saving'
        pieces = []
        try:
            while piece := data.read(_PIECE):
                pieces.append(piece)
                if self.uploading is not None and len(pieces) == 1:
                    self.uploading(image_id)
                if self.took is not None:
                    self.took(image_id)
        except BaseException:
            image['status'] = 'queued'
            raise
        if image_id not in self._glance.images:
            raise exception.ImageNotFound(image_id=image_id)
        content = b''.join(pieces)
        self._glance._imagedata[image_id] = content
        image.update(
            status='active', size=len(content), os_hash_algo='sha512',
            os_hash_value=hashlib.sha512(content).hexdigest())

    def data(self, image_id):
        return self._glance._imagedata[image_id]
