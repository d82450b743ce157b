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

"""Descriptors of the OCI image specification (descriptor.md), not trusted."""

import dataclasses
import hashlib
import re
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors

_OCI: ty.Final = 'application/vnd.oci.image.'
_DOCKER: ty.Final = 'application/vnd.docker.'
INDEXES: ty.Final = frozenset((
    f'{_OCI}index.v1+json',
    f'{_DOCKER}distribution.manifest.list.v2+json'))
MANIFESTS: ty.Final = frozenset((
    f'{_OCI}manifest.v1+json', f'{_DOCKER}distribution.manifest.v2+json'))
CONFIGS: ty.Final = frozenset((
    f'{_OCI}config.v1+json', f'{_DOCKER}container.image.v1+json'))
#: Media type of a layer → its compression.
LAYERS: ty.Final[dict[str, str | None]] = {
    f'{_OCI}layer.v1.tar': None,
    f'{_OCI}layer.v1.tar+gzip': 'gzip',
    f'{_OCI}layer.v1.tar+zstd': 'zstd',
    f'{_DOCKER}image.rootfs.diff.tar': None,
    f'{_DOCKER}image.rootfs.diff.tar.gzip': 'gzip',
    f'{_DOCKER}image.rootfs.diff.tar.zstd': 'zstd',
}
#: The algorithms that the specification registers, with what they have; a
#: digest is a part of a path.
_DIGEST: ty.Final = re.compile(
    r'sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}')


def show(value: object) -> str:
    """Something out of a document, safe to log and of bounded length."""
    if isinstance(value, str):
        return archive.show(value)
    if value is None or isinstance(value, (bool, int, float)):
        return archive.show(str(value))[1:-1]
    return f'a {type(value).__name__}'


def unsupported(
    message: str, remedy: str, cause: str | None = None
) -> errors.ContainerError:
    """The error for an archive that no root file system is made of."""
    return errors.ContainerError(
        'image_unsupported', message, cause=cause or None, remedy=remedy)


def malformed(what: str, why: str) -> errors.ContainerError:
    return unsupported(
        'the archive is no image as the OCI specifies it',
        'Save it again with docker, podman or skopeo', f'{what}: {why}')


def check_digest(value: object, where: str) -> str:
    """:raises ContainerError: ``image_unsupported``: not of a known form"""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise malformed(where, f'{show(value)} is no digest '
                               f'(sha256, sha512)')
    return value


def hasher(digest: str, data: bytes = b'') -> 'hashlib._Hash':
    """Return a hash of the algorithm of a digest."""
    return hashlib.new(
        digest.partition(':')[0], data, usedforsecurity=False)


def short(digest: str) -> str:
    """A digest as people name it."""
    algorithm, _, value = digest.partition(':')
    return f'{algorithm}:{value[:12]}'


def array(
    value: ty.Mapping[str, ty.Any], key: str, where: str
) -> list[ty.Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise malformed(where, f'it has no list "{key}"')
    return found


def check_schema(value: ty.Mapping[str, ty.Any], where: str) -> None:
    """Raise unless it is a manifest or an index of schema version 2."""
    version = value.get('schemaVersion')
    if version != 2 or isinstance(version, bool):
        raise unsupported(
            f'the schema version of {where} is '
            f'{show(version)}, not 2',
            'Save the image with a current tool')


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """What something of an image is, how large, and which."""

    media: str
    digest: str
    #: Bytes.
    size: int
    #: Not from here: "foreign" and nondistributable layers.
    elsewhere: bool
    platform: dict[str, ty.Any] | None

    def __str__(self) -> str:
        return short(self.digest)

    @classmethod
    def of(cls, data: object, where: str) -> ty.Self:
        """:raises ContainerError: ``image_unsupported``: it is none"""
        if not isinstance(data, dict):
            raise malformed(where, 'it lacks a descriptor')
        media, size = data.get('mediaType'), data.get('size')
        if not isinstance(media, str):
            raise malformed(where, 'a descriptor has no media type')
        if type(size) is not int or size < 0:
            raise malformed(where, 'a descriptor has no size')
        platform = data.get('platform')
        if platform is not None and not isinstance(platform, dict):
            raise malformed(where, 'a platform is no object')
        return cls(
            media=media, size=size,
            digest=check_digest(data.get('digest'), where),
            elsewhere=bool(data.get('urls')), platform=platform or None)

    @property
    def path(self) -> bytes:
        """Where an image layout has it."""
        return b'blobs/' + self.digest.replace(':', '/').encode()

    def hasher(self, data: bytes = b'') -> 'hashlib._Hash':
        return hasher(self.digest, data)

    def check(self, size: int, value: str) -> None:
        """Compare with what there is.

        :param value: the hash, hexadecimal
        :raises ContainerError: ``image_truncated``
        """
        if size != self.size:
            raise archive.truncated(
                f'{self} has {size} bytes, and should have {self.size}')
        if value != self.digest.partition(':')[2]:
            raise archive.truncated(
                f'what is called {self} has another digest')


def check_layer(blob: Descriptor) -> None:
    """Raise unless it is a layer that is in the archive and can be read.

    :raises ContainerError: ``image_unsupported``
    """
    if (blob.elsewhere or '.nondistributable.' in blob.media or
            '.foreign.' in blob.media):
        raise unsupported(
            f'layer {blob} is a foreign one, to be had elsewhere only',
            'Use an image that has all of its layers')
    if blob.media not in LAYERS:
        if blob.media.endswith('+encrypted'):
            raise unsupported(
                f'layer {blob} is encrypted', 'Save the image decrypted')
        raise unsupported(
            f'layer {blob} has an unknown media type',
            'Save the image with layers in tar, gzip or zstd',
            archive.show(blob.media))
