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

"""Images: from Glance into a layer of the agent's.

The data go from Glance's connection straight to the agent's socket and are
unpacked as they come; no copy is kept on disk, and nova-compute needs neither
room nor the right to unpack anything.
"""

import contextlib
import queue
import re
import threading
import time

import cryptography.exceptions
from nova.compute import utils as compute_utils
from nova import exception
from nova.i18n import _
from nova.image import glance
from nova import objects
from oslo_concurrency import lockutils
from oslo_log import log as logging
from oslo_utils import units

from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

#: Hashes that nobody can make two images have. Glance's operator chooses the
#: algorithm (``hashing_algorithm``); MD5 and SHA-1 are among the choices.
_STRONG = frozenset(['sha256', 'sha384', 'sha512', 'sha3_256', 'sha3_384',
                     'sha3_512', 'blake2b', 'blake2s'])
_HEX = re.compile(r'^[0-9a-f]{56,128}$')

#: Pieces that travel through the pipe, and how many wait in it.
_PIECE = units.Mi
_PIECES = 8

#: How often a side that waits looks whether the other one is still there.
_TICK_S = 0.5


class _Broken(Exception):
    """The pipe was given up by its other side."""


class _Pipe:
    """What Glance's client writes and the agent's client reads.

    The writer has the interface that ``nova.image.glance`` asks of the file
    that it downloads to. The reader must not see the end before the writer
    has said that all is well: a signature is only verified when all data have
    been written.
    """

    def __init__(self, timeout, late):
        """:param late: the exception to raise after ``timeout`` seconds"""
        self._queue = queue.Queue(maxsize=_PIECES)
        self._deadline = time.monotonic() + timeout
        self._late = late
        self._reader_gone = threading.Event()
        #: What kept the writer from writing all of it.
        self.error = None

    def _expired(self):
        return time.monotonic() > self._deadline

    # The writer's side.

    def write(self, data):
        for start in range(0, len(data), _PIECE):
            self._put(bytes(data[start:start + _PIECE]))

    def truncate(self, size):
        """Nova drops what it wrote when a signature turns out to be bad."""

    def finish(self, error=None):
        """Nothing more is written, all of it is good unless ``error``."""
        self.error = error
        with contextlib.suppress(_Broken, exception.NovaException):
            self._put(None)

    def _put(self, piece):
        while not self._reader_gone.is_set():
            if self._expired():
                raise self._late
            try:
                return self._queue.put(piece, timeout=_TICK_S)
            except queue.Full:
                continue
        raise _Broken()

    # The reader's side.

    def __iter__(self):
        while True:
            try:
                piece = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                if self._expired():
                    self.error = self._late
                    raise _Broken() from None
                continue
            if piece is None:
                break
            yield piece
        if self.error is not None:
            # Anything but an ordinary end makes the agent drop the layer.
            raise _Broken()

    def close(self):
        """Nothing more is read."""
        self._reader_gone.set()


class Images:
    """Makes sure that the layer of an image is on this host.

    :param client: client of the agent
    :param timeout: limit for one import, in seconds
    """

    def __init__(self, client, timeout):
        self._client = client
        self._timeout = timeout
        self._api = glance.API()
        # An image's data never change once it is active, so neither does its
        # key. image id → (key, digest)
        self._keys = {}
        # Images whose signature was verified by this process, with the
        # certificates that were trusted.
        self._verified = set()

    def ensure(self, context, instance, image_meta):
        """Return the key of the image's layer, importing it if need be.

        :raises nova.exception.ImageUnacceptable: no container can be made of
            it
        :raises ContainerError: the agent's
        """
        image_id = image_meta.id
        _check_formats(image_meta)
        key, digest = self._key(context, image_id)
        # As with virtual machines, an image must fit into the flavor's disk.
        limit = instance.flavor.root_gb * units.Gi or None
        # One download and one check at a time for each image; whoever waits
        # here finds the layer afterwards.
        with lockutils.lock(f'pycontainer-layer-{key}'):
            size = {layer['key']: layer['bytes']
                    for layer in self._client.layer_list()}.get(key)
            if size is None:
                self._import(context, instance.trusted_certs, image_id, key,
                             digest, limit)
            elif limit is not None and size > limit:
                raise errors.ContainerError(
                    'image_too_large', f'it needs {size} bytes of disk, the '
                    f'flavor has {limit}',
                    remedy='Choose a flavor with a larger disk')
            else:
                self._verify_again(
                    context, instance.trusted_certs, image_id)
        return key

    def cache(self, context, image_id):
        """Have an image's layer here before any server needs it.

        :returns: whether it was not here yet
        :raises: as :meth:`ensure`
        """
        key, digest = self._key(context, image_id)
        _check_formats(objects.ImageMeta.from_dict(
            self._api.get(context, image_id)))
        with lockutils.lock(f'pycontainer-layer-{key}'):
            if self._client.layer_present(key):
                return False
            self._import(context, None, image_id, key, digest, None)
        return True

    def key(self, context, image_id):
        """Return the key of the layer of what Glance has.

        :raises nova.exception.NovaException: Glance does not have it
        """
        return self._key(context, image_id)[0]

    def _key(self, context, image_id):
        """Return the layer's key, and the digest that its data must have.

        Images with the same data share a layer. That must rest on a hash
        that cannot be forged, which the agent computes again; an image
        without one has a layer of its own.
        """
        if image_id not in self._keys:
            image = self._api.get(context, image_id)
            algorithm = image.get('os_hash_algo')
            value = image.get('os_hash_value')
            if algorithm in _STRONG and value and _HEX.match(value):
                self._keys[image_id] = (
                    f'{algorithm.replace("_", "")}-{value}',
                    f'{algorithm}:{value}')
            else:
                self._keys[image_id] = (
                    f'image-{image_id.replace("-", "")}', None)
        return self._keys[image_id]

    @staticmethod
    def _signature(certs, image_id):
        """What stands for a verification in the set of those made, or None.

        Nova decides itself whether to verify, by its options and by the
        certificates of the server (GlanceImageServiceV2._get_verifier).
        """
        glance_conf = glance.CONF.glance
        ids = certs.ids if certs else (
            glance_conf.default_trusted_certificate_ids
            if glance_conf.enable_certificate_validation else ())
        if not ids and not glance_conf.verify_glance_signatures:
            return None
        return image_id, frozenset(ids)

    def _verify_again(self, context, certs, image_id):
        """Verify the signature of an image whose layer is there already.

        The layer may have been made for a server that asked for no
        verification. The agent has checked the data against Glance's hash,
        so that verifying what Glance has now verifies the layer.
        """
        signature = self._signature(certs, image_id)
        if signature is None or signature in self._verified:
            return
        with _signature_errors(image_id):
            self._api.download(context, image_id, trusted_certs=certs)
        self._verified.add(signature)

    def _import(self, context, certs, image_id, key, digest, limit):
        late = exception.CouldNotFetchImage(
            _('Image %(image_id)s was not imported within %(timeout)d s. '
              'Raise [pycontainer]image_import_timeout, or see why Glance '
              'is slow') % {'image_id': image_id, 'timeout': self._timeout})
        pipe = _Pipe(self._timeout, late)
        reader = threading.Thread(
            target=self._download, name=f'image-{image_id}',
            args=(context, image_id, certs, pipe),
            daemon=True)
        reader.start()
        try:
            with compute_utils.disk_ops_semaphore:
                self._client.layer_import(
                    key, pipe, image=image_id, max_bytes=limit,
                    digest=digest)
        except _Broken:
            raise pipe.error from None
        except errors.AgentUnavailable as e:
            # The agent's client may well call it that when the stream that it
            # was sending broke off.
            if pipe.error is not None:
                raise pipe.error from e
            raise
        finally:
            pipe.close()
            reader.join(_TICK_S * 2)
        if pipe.error is not None:
            raise pipe.error
        signature = self._signature(certs, image_id)
        if signature is not None:
            self._verified.add(signature)

    def _download(self, context, image_id, trusted_certs, pipe):
        """Body of the thread that reads from Glance."""
        context.update_store()
        error = None
        try:
            with _signature_errors(image_id):
                self._api.download(context, image_id, data=pipe,
                                   trusted_certs=trusted_certs)
        except _Broken:
            LOG.debug('Download of image %s stopped by the agent', image_id)
        except exception.NovaException as e:
            error = e
        except OSError as e:
            # glanceclient's answer to a checksum that does not match, and
            # a connection that broke.
            error = exception.CouldNotFetchImage(
                _('Could not fetch image %(image_id)s: %(reason)s') %
                {'image_id': image_id, 'reason': e})
        except Exception as e:
            # A thread must hand over whatever happened: SignatureVerification
            # Error of cursive is known to Nova, the rest is reported as it
            # is.
            error = e
        pipe.finish(error)


@contextlib.contextmanager
def _signature_errors(image_id):
    """Turn the one error of a bad signature that Nova does not know."""
    try:
        yield
    except cryptography.exceptions.InvalidSignature as e:
        raise exception.ImageUnacceptable(
            image_id=image_id,
            reason=_('its signature does not match its data. Upload the '
                     'image again, or sign it again')) from e


def _check_formats(image_meta):
    """Refuse what is declared as something else than an archive.

    :raises nova.exception.ImageUnacceptable: in words for the user
    """
    disk = ('disk_format' in image_meta and image_meta.disk_format) or 'raw'
    container = ('container_format' in image_meta and
                 image_meta.container_format) or 'bare'
    if disk != 'raw':
        what = f'its disk_format is {disk}'
    elif container not in ('bare', 'docker'):
        what = f'its container_format is {container}'
    else:
        return
    raise exception.ImageUnacceptable(
        image_id=image_meta.id,
        reason=_('%s. Upload a root tarball as disk_format raw, '
                 'container_format bare') % what)
