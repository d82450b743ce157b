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
unpacked as they come; no copy is kept on disk, but for the layers of an image
in layers until the agent has applied them. nova-compute needs neither room nor
the right to unpack anything.
"""

import contextlib
import hashlib
import queue
import re
import threading
import time

import cryptography.exceptions
from cursive import exception as cursive_exception
from nova.compute import utils as compute_utils
from nova.compute import vm_states
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

#: Keys of layers of images that have no such hash begin with it.
_BY_IMAGE = 'image-'

#: Pieces that travel through the pipe, and how many wait in it.
_PIECE = units.Mi
_PIECES = 8

#: How often a side that waits looks whether the other one is still there.
_TICK_S = 0.5


class _Broken(Exception):
    """The pipe was given up by its other side."""


class _Hasher:
    """What Glance's client writes to, and only the hash is wanted of.

    :param algorithm: one of :data:`_STRONG`
    """

    def __init__(self, algorithm):
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm, usedforsecurity=False)

    def write(self, data):
        self._hash.update(data)

    def truncate(self, size):
        """Nova drops what it wrote when a signature turns out to be bad."""

    @property
    def digest(self):
        """As a layer has it."""
        return f'{self._algorithm}-{self._hash.hexdigest()}'


class _Pipe:
    """What Glance's client writes and the agent's client reads.

    The writer has the interface that ``nova.image.glance`` asks of the file
    that it downloads to. The reader must not see the end before the writer
    has said that all is well: a signature is only verified when all data have
    been written.
    """

    def __init__(self, timeout, late, hasher=None):
        """
        :param late: the exception to raise after ``timeout`` seconds
        :param hasher: is written to as well
        """
        self._hasher = hasher
        self._queue = queue.Queue(maxsize=_PIECES)
        self._deadline = time.monotonic() + timeout
        self._late = late
        self._reader_gone = threading.Event()
        #: What kept the writer from writing all of it.
        self.error = None
        #: Whether the writer wrote all of it, and all of it is good.
        self.finished = False

    def _expired(self):
        return time.monotonic() > self._deadline

    # The writer's side.

    def write(self, data):
        if self._hasher is not None:
            self._hasher.write(data)
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
        # Verifications by this process that went well: of which data, as
        # which image, with which certificates trusted.
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
        # A shelved server's own is what it had: the image that it was made of
        # and, beside that, what it wrote to its disk.
        shelved = instance.vm_state == vm_states.SHELVED_OFFLOADED
        limit = None if shelved else (
            instance.flavor.root_gb * units.Gi or None)
        # One download and one check at a time for each image; whoever waits
        # here finds the layer afterwards.
        with lockutils.lock(f'pycontainer-layer-{key}'):
            layer = {layer['key']: layer
                     for layer in self._client.layer_list()}.get(key)
            if layer is None:
                layer = self._import(context, instance.trusted_certs,
                                     image_id, key, digest, limit)
            elif limit is not None and layer['bytes'] > limit:
                raise errors.ContainerError(
                    'image_too_large', f'it needs {layer["bytes"]} bytes of '
                    f'disk, the flavor has {limit}',
                    remedy='Choose a flavor with a larger disk')
            # Also one that was just imported: the agent may have got it from
            # another host meanwhile, and then reads nothing of ours.
            self._verify(context, instance.trusted_certs, image_id, layer)
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
                    f'{_BY_IMAGE}{image_id.replace("-", "")}', None)
        return self._keys[image_id]

    def needs_verification(self, instance, key):
        """Whether the server may run on a layer only once that is verified.

        One that is named by the hash of its data is what was verified where
        the server comes from.
        """
        return (_trusted(instance.trusted_certs) is not None and
                key.startswith(_BY_IMAGE))

    def _verify(self, context, certs, image_id, layer):
        """Verify that the image is signed and the layer was made of it.

        The layer may have been made for a server that asked for no
        verification, or of an image with the same data and another signature
        or none. So what is verified is what Glance has now under the name of
        this server's image; that it is also what the layer was made of is
        seen by the hash, which the agent has computed itself.

        :raises nova.exception.ImageUnacceptable: the signature is bad, or is
            that of other data
        :raises nova.exception.CertificateValidationFailed: nobody who is
            trusted has signed
        """
        trusted = _trusted(certs)
        if trusted is None or (
                layer['digest'], image_id, trusted) in self._verified:
            return
        algorithm = layer['digest'].rpartition('-')[0]
        if algorithm not in _STRONG:
            raise _not_of_the_image(image_id, layer)
        hasher = _Hasher(algorithm)
        with _download_errors(image_id):
            self._api.download(
                context, image_id, data=hasher, trusted_certs=certs)
        if hasher.digest != layer['digest']:
            raise _not_of_the_image(image_id, layer)
        self._verified.add((hasher.digest, image_id, trusted))

    def _import(self, context, certs, image_id, key, digest, limit):
        """Have the agent make the layer; returns what it says of it."""
        late = exception.CouldNotFetchImage(
            _('Image %(image_id)s was not imported within %(timeout)d s. '
              'Raise [pycontainer]image_import_timeout, or see why Glance '
              'is slow') % {'image_id': image_id, 'timeout': self._timeout})
        trusted = _trusted(certs)
        # The agent's own choice where there is no hash to check against.
        hasher = None if trusted is None else _Hasher(
            digest.partition(':')[0] if digest else 'sha256')
        pipe = _Pipe(self._timeout, late, hasher)
        reader = threading.Thread(
            target=self._download, name=f'image-{image_id}',
            args=(context, image_id, certs, pipe),
            daemon=True)
        reader.start()
        try:
            with compute_utils.disk_ops_semaphore:
                layer = self._client.layer_import(
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
        if pipe.finished and hasher is not None:
            self._verified.add((hasher.digest, image_id, trusted))
        return layer

    def _download(self, context, image_id, trusted_certs, pipe):
        """Body of the thread that reads from Glance."""
        context.update_store()
        error = None
        try:
            with _download_errors(image_id):
                self._api.download(context, image_id, data=pipe,
                                   trusted_certs=trusted_certs)
        except _Broken:
            LOG.debug('Download of image %s stopped by the agent', image_id)
        except exception.NovaException as e:
            error = e
        except Exception as e:
            # A thread must hand over whatever happened.
            error = e
        else:
            pipe.finished = True
        pipe.finish(error)


def _trusted(certs):
    """The ids of the certificates that are trusted, or None: not verified.

    Nova decides itself whether to verify, by its options and by the
    certificates of the server (GlanceImageServiceV2._get_verifier).

    :param certs: those of the server, or None
    """
    conf = glance.CONF.glance
    if certs:
        return frozenset(certs.ids)
    if (conf.enable_certificate_validation and
            conf.default_trusted_certificate_ids):
        return frozenset(conf.default_trusted_certificate_ids)
    return frozenset() if conf.verify_glance_signatures else None


@contextlib.contextmanager
def _download_errors(image_id):
    """Say what is wrong with an image, in a class that survives an RPC."""
    try:
        yield
    except cryptography.exceptions.InvalidSignature as e:
        raise exception.ImageUnacceptable(
            image_id=image_id,
            reason=_('its signature does not match its data. Upload the '
                     'image again, or sign it again')) from e
    except cursive_exception.SignatureVerificationError as e:
        raise exception.ImageUnacceptable(
            image_id=image_id,
            # Nova keeps the beginning of a fault only; what stands around
            # the reason says the same again.
            reason=e.kwargs.get('reason') or e.format_message()) from e
    except OSError as e:
        # glanceclient's answer to a checksum that does not match, and a
        # connection that broke.
        raise exception.CouldNotFetchImage(
            _('Could not fetch image %(image_id)s: %(reason)s') %
            {'image_id': image_id, 'reason': e}) from e


def _not_of_the_image(image_id, layer):
    return exception.ImageUnacceptable(
        image_id=image_id,
        reason=_('its layer on this host holds other data than are signed: '
                 'pycontainer layers --delete %s') % layer['key'])


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
        reason=_('%s. Upload a root tarball (bare) or an OCI or docker '
                 'archive (docker) as disk_format raw') % what)
