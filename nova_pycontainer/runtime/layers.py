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

"""Layers: images unpacked once on this host, shared by their containers.

``<layers>/<key>/`` holds ``root/``, the image's files with the owners 0 to
65535 on disk, and ``layer.json``. A layer appears whole, by a rename, after
everything of it is on disk; until then it grows in ``<layers>/.staging/``.

The directory is closed to all users of the host: set-user-id files in it
belong to uid 0.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import subprocess
import sys
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import config
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import imagecheck
from nova_pycontainer.runtime import layer_copy
from nova_pycontainer.runtime import ociarchive
from nova_pycontainer.runtime import unpack_client
from nova_pycontainer.runtime import unpack_job

LOG = logging.getLogger(__name__)

FORMAT: ty.Final = 1
_STAGING: ty.Final = '.staging'
_LOCKS: ty.Final = '.locks'
_POLL_SECONDS: ty.Final = 0.05
_REMOVE_SECONDS: ty.Final = 1800


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One layer, as ``layer.json`` says.

    ``bytes`` is the disk space of its files, ``compressed_bytes`` the size
    of the image that it was made from; ``digest`` is "<algorithm>-<hex>".
    """

    key: str
    image: str
    digest: str
    compressed_bytes: int
    bytes: int
    entries: int
    arch: str | None
    created_at: float
    #: Not in the file, which may be moved with its directory.
    root: pathlib.Path

    def to_dict(self) -> dict[str, ty.Any]:
        data = dataclasses.asdict(self)
        del data['root']
        return {'format': FORMAT, **data}

    @classmethod
    def load(cls, directory: pathlib.Path) -> 'LayerInfo':
        """:raises ContainerError: ``internal``: not a layer of this format
        """
        try:
            data = json.loads((directory / 'layer.json').read_bytes())
            return cls.from_dict(data, directory)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise errors.ContainerError(
                'internal', f'layer {directory.name} cannot be read',
                cause=str(e), remedy='Delete its directory; the image will '
                'be imported again') from e

    @classmethod
    def from_dict(
        cls, data: ty.Mapping[str, ty.Any], directory: pathlib.Path
    ) -> 'LayerInfo':
        """Rebuild what :meth:`to_dict` gave.

        :raises ContainerError: ``internal``: another format
        :raises TypeError, KeyError: it is no such thing
        """
        fields = dict(data)
        number = fields.pop('format')
        if number != FORMAT:
            raise errors.ContainerError(
                'internal', f'layer {directory.name} has format {number!r}',
                remedy=f'This version reads format {FORMAT}: upgrade '
                'pycontainer-agent')
        return cls(root=directory / 'root', **fields)


def _fsync_directory(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: pathlib.Path) -> None:
    """Remove a tree, whose writer may just be dying.

    rm(1), because shutil.rmtree reads a whole directory into memory, and one
    may have a million entries.

    :raises ContainerError: ``internal``
    """
    for pause in (0.1, 1.0, 0.0):
        try:
            done = subprocess.run(
                ['rm', '-rf', '--', path], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                timeout=_REMOVE_SECONDS)
        except subprocess.TimeoutExpired:
            cause = f'not done after {_REMOVE_SECONDS} s'
            break
        if not done.returncode:
            return
        cause = done.stderr.decode(errors='replace')[-300:].strip()
        time.sleep(pause)
    raise errors.ContainerError(
        'internal', f'{path} cannot be removed', cause=cause,
        remedy='Remove it by hand; the next start tries again')


def _chunks(
    stream: ty.BinaryIO | cabc.Iterable[bytes]
) -> cabc.Iterator[bytes]:
    read = getattr(stream, 'read', None)
    if read is None:
        # An empty piece of an iterable is not its end.
        yield from filter(None, stream)
        return
    while chunk := read(archive.CHUNK):
        yield chunk


class LayerStore:
    """The layers of one host.

    Safe to use from several threads and processes at once.

    :param unpack_base: first host id of the 65536 that images are unpacked
        as; nothing else may use them
    :param max_entries: limit for one image, in place of the one in limits
    :param max_bytes: likewise
    :param in_use: returns the keys of layers that containers need
    :param python: interpreter that runs the unpacking process
    :param timeout: seconds for one import, and for the wait for another's
    """

    def __init__(
        self,
        layers_dir: pathlib.Path,
        *,
        unpack_base: int,
        max_entries: int | None = None,
        max_bytes: int | None = None,
        in_use: ty.Callable[[], cabc.Collection[str]] = frozenset,
        limits: archive.Limits | None = None,
        python: str | None = None,
        timeout: float = 3600.0,
    ) -> None:
        self._dir = pathlib.Path(layers_dir)
        self._base = unpack_base
        limits = limits or archive.Limits()
        self._limits = dataclasses.replace(
            limits, entries=max_entries or limits.entries,
            bytes=max_bytes or limits.bytes)
        self._in_use = in_use
        self._python = python or sys.executable
        self._timeout = timeout
        for path in (self._dir, self._dir / _STAGING, self._dir / _LOCKS):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)

    @contextlib.contextmanager
    def locked(
        self, key: str, *, wait: bool = True,
        cancelled: cabc.Callable[[], bool] = lambda: False,
    ) -> cabc.Iterator[None]:
        """Hold the one lock on a layer, across threads and processes.

        :param cancelled: whether to wait no longer
        :raises ContainerError: ``timeout``, ``aborted``
        """
        deadline = time.monotonic() + (self._timeout if wait else 0)
        path = self._dir / _LOCKS / f'{config.check_layer_key(key)}.lock'
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder may have removed the file that we opened.
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    raise errors.ContainerError(
                        'timeout', f'layer {key} is being changed by '
                        f'somebody else', remedy='Try again later') from None
                if cancelled():
                    os.close(fd)
                    raise errors.ContainerError(
                        'aborted', 'the wait for a layer was aborted'
                    ) from None
            except FileNotFoundError:
                pass
            os.close(fd)
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    def get(self, key: str) -> LayerInfo | None:
        """Return a layer, or None if it is not there.

        :raises ContainerError: ``internal``: it is there and not readable
        """
        directory = self._dir / config.check_layer_key(key)
        return LayerInfo.load(directory) if directory.exists() else None

    def require(self, key: str) -> LayerInfo:
        """Return a layer.

        :raises ContainerError: ``layer_missing``; ``internal``
        """
        info = self.get(key)
        if info is None:
            raise errors.ContainerError(
                'layer_missing', f'layer {key} is not on this host',
                remedy='Import the image again')
        return info

    def list(self) -> cabc.Sequence[LayerInfo]:
        """Return all layers, in the order of their keys."""
        found = []
        for path in sorted(self._dir.iterdir()):
            if path.name.startswith('.'):
                continue
            try:
                found.append(LayerInfo.load(path))
            except errors.ContainerError as e:
                if path.exists():
                    LOG.warning('skipping: %s', e)
        return found

    def delete(self, key: str) -> None:
        """Remove a layer; nothing happens if it is not there.

        :raises ContainerError: ``layer_in_use``, ``timeout``
        """
        with self.locked(key):
            if key in self._in_use():
                raise errors.ContainerError(
                    'layer_in_use', f'layer {key} has containers',
                    remedy='Delete them first')
            directory = self._dir / key
            if directory.exists():
                gone = self._staging(key)
                directory.rename(gone)
                _remove(gone)
                LOG.info('deleted layer %s', key)

    def recover(self) -> None:
        """Remove what a killed process or a former release left behind.

        What a living one is just making is locked, and stays; so does what
        is in use.
        """
        # "<key>.<random>" there, "<key>.lock" here.
        keys = {path.name.rpartition('.')[0] for name in (_STAGING, _LOCKS)
                for path in (self._dir / name).iterdir()}
        for key in sorted(keys):
            try:
                with self.locked(key, wait=False):
                    self._clean(key)
            except errors.ContainerError as e:
                LOG.info('staging directories of %s stay: %s', key, e)
        # Of an image in layers an agent that knew none unpacked the archive:
        # that must not be what its servers run on when they come here.
        for info in self.list():
            if ociarchive.is_one(info.root):
                try:
                    self.delete(info.key)
                except errors.ContainerError as e:
                    LOG.warning('layer %s stays as an archive: %s',
                                info.key, e)

    def _clean(self, key: str) -> None:
        """Remove staging directories of a locked key: nobody writes there.
        """
        for path in (self._dir / _STAGING).glob(f'{key}.*'):
            _remove(path)
            LOG.info('removed %s, left by an interrupted change', path.name)

    def _staging(self, key: str) -> pathlib.Path:
        return self._dir / _STAGING / f'{key}.{secrets.token_hex(4)}'

    def import_layer(
        self,
        key: str,
        stream: ty.BinaryIO | cabc.Iterable[bytes],
        *,
        image: str,
        max_bytes: int | None = None,
        digest: tuple[str, str] | None = None,
    ) -> LayerInfo:
        """Unpack an image, unless its layer is there already.

        One import of a key runs at a time; the others wait and find it done
        (their streams are not read). Nothing is left of a failed one.

        :param image: the image's name, for messages
        :param max_bytes: the disk of the flavor that is to hold it
        :param digest: algorithm and hex digest that the stream must have
        :raises ContainerError: an ``image_*`` code, ``no_space``,
            ``invalid`` (the digest is another one), ``timeout``
        """
        with self.locked(key):
            info = self.get(key)
            if info is None:
                self._clean(key)
                staging = self._staging(key)
                try:
                    info = self._import(
                        staging, key, stream, image, max_bytes, digest)
                except errors.ContainerError as e:
                    e.message = f'image {image!r}: {e.message}'
                    raise
                finally:
                    # Renamed away if all went well.
                    if staging.exists():
                        try:
                            _remove(staging)
                        except errors.ContainerError:
                            # Not in place of the import's own error.
                            LOG.exception('left behind')
            elif max_bytes is not None and info.bytes > max_bytes:
                raise archive.too_large(
                    f'image {image!r} needs {info.bytes} bytes of disk, and '
                    f'{max_bytes} are allowed',
                    'Choose a flavor with a larger disk')
            return info

    def adopt(
        self,
        data: ty.Mapping[str, ty.Any],
        fill: ty.Callable[[pathlib.Path], object],
        cancelled: cabc.Callable[[], bool] = lambda: False,
    ) -> LayerInfo:
        """Make a layer that another host has, unless it is there already.

        For an image that no image store has any more. That it holds what the
        image held can be checked against nothing: the other host is trusted.

        :param data: its description on the other host (``to_dict``)
        :param fill: makes the copy, in the empty root directory that it is
            called with. What it raises goes on to the caller
        :param cancelled: whether to wait no longer for another who is just
            making it
        :raises ContainerError: ``invalid``, ``image_wrong_arch``,
            ``image_too_large``, ``no_space``, ``timeout``, ``aborted``
        """
        try:
            key = config.check_layer_key(data['key'])
            new = LayerInfo.from_dict(data, self._dir / key)
        except (TypeError, KeyError) as e:
            raise errors.ContainerError(
                'invalid', 'this is not the description of a layer',
                cause=repr(e)) from e
        imagecheck.check_arch(new.arch)
        layer_copy.check_size(new.bytes, new.entries, self._limits)
        with self.locked(key, cancelled=cancelled):
            info = self.get(key)
            if info is None:
                self._clean(key)
                layer_copy.check_room(self._dir, new.bytes, self._limits)
                staging = self._staging(key)
                try:
                    staging.mkdir(mode=0o700)
                    root = staging / 'root'
                    root.mkdir(mode=0o755)
                    fill(root)
                    layer_copy.check(root)
                    self._publish(staging, new)
                    info = new
                finally:
                    if staging.exists():
                        _remove(staging)
                LOG.info('layer %s (image %s) came from another host', key,
                         info.image)
            return info

    def _import(
        self,
        staging: pathlib.Path,
        key: str,
        stream: ty.BinaryIO | cabc.Iterable[bytes],
        image: str,
        max_bytes: int | None,
        digest: tuple[str, str] | None,
    ) -> LayerInfo:
        algorithm, expected = digest or ('sha256', None)
        try:
            hasher = hashlib.new(algorithm, usedforsecurity=False)
            hasher.hexdigest()
        except (ValueError, TypeError) as e:
            raise errors.ContainerError(
                'invalid', f'digest algorithm {algorithm!r} cannot be used',
                cause=str(e)) from None
        limit = self._limits.bytes
        if max_bytes is not None:
            limit = min(limit, max_bytes)
        started = time.monotonic()
        staging.mkdir(mode=0o700)
        root = staging / 'root'
        root.mkdir()
        # What it is if the archive does not say; whatever our umask.
        root.chmod(0o755)
        counted = 0

        def hashed() -> cabc.Iterator[bytes]:
            nonlocal counted
            for chunk in _chunks(stream):
                hasher.update(chunk)
                counted += len(chunk)
                yield chunk

        result = unpack_client.run(
            self._python,
            unpack_job.Job(str(root), self._base, limit, self._limits),
            hashed(), self._timeout)
        if expected is not None and hasher.hexdigest() != expected.lower():
            raise errors.ContainerError(
                'invalid', 'the image is not what it should be',
                cause=f'its {algorithm} is {hasher.hexdigest()}, and '
                f'{expected} was expected',
                remedy='The download was damaged or the image was changed: '
                'try again, then check the image store')
        machine = imagecheck.arch(root)
        imagecheck.check_arch(machine)
        info = LayerInfo(
            key=key, image=image,
            digest=f'{hasher.name}-{hasher.hexdigest()}',
            compressed_bytes=counted, bytes=result.bytes,
            entries=result.entries, arch=machine, created_at=time.time(),
            root=self._dir / key / 'root')
        unpacked = time.monotonic()
        self._publish(staging, info)
        release = imagecheck.os_release(info.root)
        LOG.info(
            'image %r (%s %s, %s) is layer %s: %d entries, %d bytes from %d; '
            'unpacked in %.1f s, on disk after %.1f s more', image,
            release.get('ID', 'unknown'), release.get('VERSION_ID', ''),
            machine, key, info.entries, info.bytes, counted,
            unpacked - started, time.monotonic() - unpacked)
        for what, count in result.notes.items():
            LOG.info('image %r: left out %d %s', image, count, what)
        return info

    def _publish(self, staging: pathlib.Path, info: LayerInfo) -> None:
        """Make a layer out of a staging directory, on disk before in name."""
        unpack_client.sync_filesystem(staging)
        with open(staging / 'layer.json', 'w') as f:
            json.dump(info.to_dict(), f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        _fsync_directory(staging)
        staging.rename(self._dir / info.key)
        _fsync_directory(self._dir)
