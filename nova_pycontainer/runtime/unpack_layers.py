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

"""A root file system out of an archive of container layers.

The archive's own files were unpacked already, as those of any archive: its
layers may stand in any order before the list that orders them. Here they are
applied to a new directory beside them, and each one is removed as soon as it
is. All of it happens in the sandbox, within the limits of one image.

A layer's size and digest are compared before anything is made of it. What
Docker writes has neither of them; there it is the digest of the tar archive
in it, which the image's configuration has.
"""

import collections
import collections.abc as cabc
import os
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import extract
from nova_pycontainer.runtime import imagestream
from nova_pycontainer.runtime import layering
from nova_pycontainer.runtime import ociarchive
from nova_pycontainer.runtime import ocidescriptor
from nova_pycontainer.runtime import unpack_job


def unpack(
    top_fd: int, staged: unpack_job.Result, max_bytes: int,
    limits: archive.Limits,
) -> unpack_job.Result:
    """Make the image's root in a directory that alone is left in ``top_fd``.

    :param top_fd: directory with the files of the archive
    :param staged: what these files take
    :param max_bytes: disk space that the root may take, as the files may.
        Both together may take what the limits have for one image
    :raises ContainerError: as :func:`.ociarchive.layers` and
        :class:`.layering.Applier`
    """
    layers = ociarchive.layers(top_fd, limits)
    taken = os.listdir(top_fd)
    name = next(name for name in (f'root{i}' for i in range(len(taken) + 1))
                if name not in taken)
    os.mkdir(name, dir_fd=top_fd)
    root_fd = os.open(
        name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
        dir_fd=top_fd)
    try:
        os.fchmod(root_fd, 0o755)
        applier = layering.Applier(root_fd, limits, staged.entries)
        left = collections.Counter(layer.path for layer in layers)
        size = staged.bytes
        for number, layer in enumerate(layers, 1):
            try:
                left[layer.path] -= 1
                size -= _apply(
                    top_fd, layer, applier,
                    min(max_bytes, max(limits.bytes - size, 0)), limits,
                    last=not left[layer.path])
            except errors.ContainerError as e:
                e.cause = f'in layer {number} of {len(layers)}' + (
                    f': {e.cause}' if e.cause else '')
                raise
        result = applier.finish()
    finally:
        os.close(root_fd)
    rest = layering.Applier(top_fd, limits, 0)
    for other in taken:
        rest.hide(os.fsencode(other))
    notes = collections.Counter(staged.notes) + collections.Counter(
        result.notes)
    return result._replace(notes=dict(notes), nested=True)


def _apply(
    top_fd: int, layer: ociarchive.Layer, applier: layering.Applier,
    max_bytes: int, limits: archive.Limits, *, last: bool,
) -> int:
    """Check a layer and apply it.

    :param last: remove its file then
    :returns: the disk space that became free by that
    """
    fd = ociarchive.open_file(top_fd, layer.path)
    try:
        if layer.blob is None:
            _check(fd, layer, limits, None)
        else:
            _check_blob(fd, layer.blob)
        _check(fd, layer, limits,
               lambda reader: applier.apply(reader, max_bytes))
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not last:
        return 0
    os.unlink(layer.path, dir_fd=top_fd)
    return extract.blocks(status.st_size) if status.st_nlink == 1 else 0


def _check_blob(fd: int, blob: ocidescriptor.Descriptor) -> None:
    size = os.fstat(fd).st_size
    hasher = blob.hasher()
    # A wrong size is told without a look at what may be the wrong file.
    if size == blob.size:
        for piece in imagestream.Input(fd):
            hasher.update(piece)
    blob.check(size, hasher.hexdigest())


def _check(
    fd: int, layer: ociarchive.Layer, limits: archive.Limits,
    use: ty.Callable[[archive.Reader], None] | None,
) -> None:
    """Read a layer's tar archive and compare its digest.

    :param use: reads the archive to its end
    """
    os.lseek(fd, 0, os.SEEK_SET)
    source = imagestream.Input(fd)
    packed, pieces = imagestream.decompressed(source)
    if layer.blob and packed != ocidescriptor.LAYERS[layer.blob.media]:
        raise ocidescriptor.unsupported(
            f'layer {layer.blob} is not of its media type',
            'Save the image again', f'{packed or "no"} compression')
    hasher = ocidescriptor.hasher(layer.diff_id)

    def hashed() -> cabc.Iterator[bytes]:
        for piece in pieces:
            hasher.update(piece)
            yield piece

    reader = imagestream.tar(
        hashed(), packed, limits, lambda: source.consumed, empty=True)
    if use is not None:
        use(reader)
    else:
        while reader.chunk(archive.CHUNK):
            pass
    if hasher.hexdigest() != layer.diff_id.partition(':')[2]:
        raise archive.truncated(
            f'what is called {ocidescriptor.short(layer.diff_id)} has '
            f'another digest')
