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

"""What an archive of container layers says of itself: which layers to apply.

Two kinds are read, both after their files were unpacked as those of any
archive: an OCI image layout (``oci-layout``, ``index.json`` and ``blobs/``;
image specification 1.1, image-layout.md), and what "docker save" writes
(``manifest.json``). Newer Dockers write both in one; the former is read then,
for it has a digest of everything.

Everything here is untrusted: the size of each document is limited, what a
digest does not fit is not read, and files are opened below the archive only,
through no symbolic link that was not looked at.
"""

import collections.abc as cabc
import hashlib
import json
import os
import re
import stat
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import imageplatform
from nova_pycontainer.runtime import init
from nova_pycontainer.runtime import ocidescriptor
from nova_pycontainer.runtime import syscalls

#: Bytes of one JSON document. Registries take no larger manifests.
MAX_DOCUMENT: ty.Final = 4 << 20
#: Documents that are read for one image, indexes in indexes, and layers.
_MAX_DOCUMENTS: ty.Final = 256
_MAX_DEPTH: ty.Final = 4
_MAX_LAYERS: ty.Final = 1000
_MAX_LINKS: ty.Final = 8

_LAYOUT: ty.Final = b'oci-layout'
_INDEX: ty.Final = b'index.json'
_DOCKER: ty.Final = b'manifest.json'
#: One of these is in every root file system that has an init.
_OF_A_ROOT: ty.Final = frozenset(
    os.fsencode(path.split('/')[1]) for path in init.CANDIDATES)
#: Of an image's configuration in a Docker archive, which is named by it.
_CONFIG_NAME: ty.Final = re.compile(r'(?:.*/)?([0-9a-f]{64})(?:\.json)?')

Json = ty.Any


class Layer(ty.NamedTuple):
    """One layer: where it is in the archive, and what it has to be."""

    path: bytes
    #: Digest and size of the file; None where the archive says none.
    blob: ocidescriptor.Descriptor | None
    #: Digest of the tar archive in it.
    diff_id: str


def is_one(root: int | os.PathLike[str]) -> bool:
    """Whether these are the files of an archive of container layers.

    Told by the names at the top alone. What has a directory that an init
    could be in is a root file system, whatever else there is.
    """
    names = {os.fsencode(name) for name in os.listdir(root)}
    return bool(names & {_LAYOUT, _DOCKER}) and not names & _OF_A_ROOT


def layers(root_fd: int, limits: archive.Limits) -> list[Layer]:
    """Return the layers of the archive's image for this host, lowest first.

    :param root_fd: directory with the archive's files
    :raises ContainerError: ``image_truncated``: something is missing or is
        not what its digest says; ``image_unsupported``; ``image_wrong_arch``;
        ``image_too_large``; ``image_unsafe_entry``: a path that leads out
    """
    names = os.listdir(root_fd)
    if os.fsdecode(_LAYOUT) in names:
        return _Layout(root_fd).layers()
    return _docker(root_fd, limits)


def open_file(root_fd: int, path: bytes) -> int:
    """Open a regular file of the archive for reading.

    :raises ContainerError: ``image_truncated``: there is none
    """
    try:
        fd = syscalls.openat2(
            root_fd, os.fsdecode(path), os.O_RDONLY | os.O_NONBLOCK,
            syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
    except OSError as e:
        raise archive.truncated(
            f'there is no file {archive.show(path)} in it: {e.strerror}'
        ) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise archive.truncated(f'{archive.show(path)} in it is no file')
    return fd


def _read(root_fd: int, path: bytes) -> bytes:
    """Read a JSON document."""
    with open(open_file(root_fd, path), 'rb') as f:
        data = f.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise archive.too_large(
            f'{archive.show(path)} has more than {MAX_DOCUMENT} bytes',
            'Use an image with shorter metadata')
    return data


def _parse(data: bytes, path: bytes, kind: type) -> Json:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise archive.truncated(
            f'{archive.show(path)} is not JSON: {archive.show(str(e))}'
        ) from e
    if not isinstance(value, kind):
        raise ocidescriptor.malformed(
            archive.show(path), f'it is no JSON {kind.__name__}')
    return value


class _Layout:
    """An OCI image layout."""

    def __init__(self, root_fd: int) -> None:
        self._root = root_fd
        self._documents = 0
        #: Digests of what was looked at.
        self._seen: set[str] = set()
        #: Platforms of others' images, media types of what is no image.
        self._others: set[str] = set()
        self._unknown: set[str] = set()
        #: Preference, manifest and configuration of what this host runs.
        self._found: list[tuple[int, Json, Json]] = []

    def layers(self) -> list[Layer]:
        version = _parse(_read(self._root, _LAYOUT), _LAYOUT, dict).get(
            'imageLayoutVersion')
        if version != '1.0.0':
            raise ocidescriptor.unsupported(
                f'the version of the archive\'s layout is '
                f'{ocidescriptor.show(version)}, not 1.0.0',
                'Save the image with a current tool')
        self._index(_parse(_read(self._root, _INDEX), _INDEX, dict),
                    'index.json', 0)
        manifest, config = self._choose()
        return _of_manifest(manifest, config)

    def _document(self, wanted: ocidescriptor.Descriptor) -> Json:
        self._documents += 1
        if self._documents > _MAX_DOCUMENTS:
            raise archive.too_large(
                f'the archive has more than {_MAX_DOCUMENTS} manifests',
                'Save one image alone')
        if wanted.size > MAX_DOCUMENT:
            raise archive.too_large(
                f'{wanted} has {wanted.size} bytes of metadata, more than '
                f'{MAX_DOCUMENT}', 'Use an image with shorter metadata')
        data = _read(self._root, wanted.path)
        wanted.check(len(data), wanted.hasher(data).hexdigest())
        return _parse(data, wanted.path, dict)

    def _index(self, index: Json, name: str, depth: int) -> None:
        ocidescriptor.check_schema(index, name)
        for item in ocidescriptor.array(index, 'manifests', name):
            descriptor = ocidescriptor.Descriptor.of(item, name)
            if descriptor.digest in self._seen:
                continue
            self._seen.add(descriptor.digest)
            platform = descriptor.platform
            if platform and imageplatform.rank(platform) is None:
                self._others.add(imageplatform.name(platform))
            elif descriptor.media in ocidescriptor.INDEXES:
                if depth == _MAX_DEPTH:
                    raise ocidescriptor.unsupported(
                        f'there are more than {_MAX_DEPTH} indexes within '
                        f'one another', 'Save one image alone')
                self._index(
                    self._document(descriptor), str(descriptor), depth + 1)
            elif descriptor.media in ocidescriptor.MANIFESTS:
                self._manifest(descriptor)
            else:
                self._unknown.add(descriptor.media)

    def _manifest(self, descriptor: ocidescriptor.Descriptor) -> None:
        manifest = self._document(descriptor)
        ocidescriptor.check_schema(manifest, str(descriptor))
        config = ocidescriptor.Descriptor.of(
            manifest.get('config'), str(descriptor))
        if config.media not in ocidescriptor.CONFIGS:
            # Helm charts, signatures and the like.
            self._unknown.add(config.media)
            return
        data = self._document(config)
        rank = imageplatform.rank(data)
        if rank is None:
            self._others.add(imageplatform.name(data))
        else:
            self._found.append((rank, manifest, data))

    def _choose(self) -> tuple[Json, Json]:
        here = imageplatform.host()
        if not self._found:
            if self._others:
                raise _wrong_platform(self._others)
            raise ocidescriptor.unsupported(
                'the archive holds no image of a file system',
                'Save an image of a whole system', ', '.join(
                    sorted(map(archive.show, self._unknown))[:8]))
        best = min(rank for rank, _, _ in self._found)
        found = [(manifest, config) for rank, manifest, config in self._found
                 if rank == best]
        if len(found) > 1:
            raise _several(f'{len(found)} images for {here}')
        return found[0]


def _several(what: str) -> errors.ContainerError:
    return ocidescriptor.unsupported(
        f'the archive holds {what}', 'Save one image alone')


def _wrong_platform(others: cabc.Collection[str]) -> errors.ContainerError:
    return errors.ContainerError(
        'image_wrong_arch', f'the image is not for {imageplatform.host()}',
        cause=f'it is for {", ".join(sorted(others)[:8])}',
        remedy='Use an image for the right architecture, and set its '
        'property hw_architecture')


def _diff_ids(config: Json, count: int) -> list[str]:
    """Return the digests of an image's layers as its configuration says."""
    rootfs = config.get('rootfs')
    found = ocidescriptor.array(
        rootfs if isinstance(rootfs, dict) else {}, 'diff_ids',
        'the configuration')
    for digest in found:
        ocidescriptor.check_digest(digest, 'the configuration')
    if len(found) != count:
        raise ocidescriptor.malformed(
            'the configuration', f'it has {len(found)} layers, and the '
            f'manifest {count}')
    if not 0 < count <= _MAX_LAYERS:
        raise ocidescriptor.unsupported(
            f'the image has {count} layers', f'Use an image with 1 to '
            f'{_MAX_LAYERS}')
    return ty.cast(list[str], found)


def _of_manifest(manifest: Json, config: Json) -> list[Layer]:
    blobs = []
    for item in ocidescriptor.array(manifest, 'layers', 'the manifest'):
        blob = ocidescriptor.Descriptor.of(item, 'the manifest')
        ocidescriptor.check_layer(blob)
        blobs.append(blob)
    return [Layer(blob.path, blob, diff_id) for blob, diff_id in zip(
        blobs, _diff_ids(config, len(blobs)))]


def _docker(root_fd: int, limits: archive.Limits) -> list[Layer]:
    images = _parse(_read(root_fd, _DOCKER), _DOCKER, list)
    if len(images) != 1:
        raise _several(f'{len(images) or "no"} images')
    image, = images
    name = 'manifest.json'
    if not isinstance(image, dict) or not isinstance(
            image.get('Config'), str):
        raise ocidescriptor.malformed(name, 'its image has no "Config"')
    path = _resolve(root_fd, image['Config'], limits)
    data = _read(root_fd, path)
    named = _CONFIG_NAME.fullmatch(image['Config'])
    if named and hashlib.sha256(data).hexdigest() != named[1]:
        raise archive.truncated(
            f'{archive.show(path)} is not what its name says')
    config = _parse(data, path, dict)
    if imageplatform.rank(config) is None:
        raise _wrong_platform([imageplatform.name(config)])
    paths = []
    for item in ocidescriptor.array(image, 'Layers', name):
        if not isinstance(item, str):
            raise ocidescriptor.malformed(name, 'a layer is no path')
        paths.append(item)
    # Before the links of a thousand layers are followed.
    diff_ids = _diff_ids(config, len(paths))
    return [Layer(_resolve(root_fd, item, limits), None, diff_id)
            for item, diff_id in zip(paths, diff_ids)]


def _resolve(root_fd: int, name: str, limits: archive.Limits) -> bytes:
    """Follow the links that layers which occur twice are in an archive.

    :returns: a path that may be one of anything or nothing
    :raises ContainerError: ``image_unsafe_entry``: it leads out
    """
    parts = archive.split_name(name, limits)
    for _ in range(_MAX_LINKS):
        try:
            fd = syscalls.openat2(
                root_fd, os.fsdecode(b'/'.join(parts) or b'.'),
                os.O_PATH | os.O_NOFOLLOW,
                syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
        except OSError:
            break  # whoever opens it says why
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                break
            target = os.readlink(b'', dir_fd=fd)
        finally:
            os.close(fd)
        parts.pop()
        if target.startswith(b'/'):
            raise archive.unsafe(name, 'it is a link out of the archive')
        for part in target.split(b'/'):
            if part == b'..' and not parts:
                raise archive.unsafe(name, 'it is a link out of the archive')
            if part == b'..':
                parts.pop()
            elif part not in (b'', b'.'):
                parts.append(part)
    return b'/'.join(parts)
