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

"""Applying the layers of a container image, one after the other.

The rules are those of the image specification (layer.md, "Applying
Changesets"), read as an untrusted archive's wishes:

* An entry of a layer replaces what lower layers have there, whatever it is;
  a directory that stays one keeps its content and gets the entry's
  attributes. Within one layer the rules of a root archive go on: what is not
  a directory does not replace one.
* ``.wh.NAME`` hides NAME, ``.wh..wh..opq`` all of its directory, of lower
  layers only, wherever in the layer it stands.
* A whiteout is followed through no symbolic link, and what it hides may be a
  link but never what that points to: the tools that make layers name
  directories as they really are. What is not there is hidden already, and so
  is what the same layer has put something else in place of. Below a link of a
  lower layer it is refused, for what it is to hide would stay.
* AUFS's own records (``.wh..wh.*``) are left out, as Docker leaves them out.
"""

import errno
import os
import stat
import tarfile
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import extract
from nova_pycontainer.runtime import posixacl
from nova_pycontainer.runtime import unpack_job

_WHITEOUT: ty.Final = b'.wh.'
_OPAQUE: ty.Final = b'.wh..wh..opq'
_AUFS: ty.Final = b'.wh..wh.'


def _join(parent: bytes, name: bytes) -> bytes:
    return parent + b'/' + name if parent else name


class Applier(extract.Extractor):
    """Makes one root file system out of layers.

    :param root_fd: empty directory
    :param entries: those that count already
    """

    def __init__(
        self, root_fd: int, limits: archive.Limits, entries: int
    ) -> None:
        super().__init__(
            root_fd, archive.Reader(iter(()), limits, lambda: 0), limits, 0)
        self._entries = self._before = entries
        #: What the layer that is being applied has made, and all directories
        #: on the way to it.
        self._own: set[bytes] = set()

    def apply(self, reader: archive.Reader, max_bytes: int) -> None:
        """Apply the next layer.

        :param max_bytes: disk space that all layers may take up to here
        :raises ContainerError: as :class:`.extract.Extractor`
        """
        self._reader = reader
        self._max_bytes = max_bytes
        self._next_check = 0
        self._own.clear()
        self._unpack()

    def finish(self) -> unpack_job.Result:
        """:raises ContainerError: ``image_not_archive``: there was nothing
        """
        self._entries -= self._before
        return self._finish()

    def hide(self, path: bytes) -> None:
        """Remove what lower layers have at ``path``, with all below it.

        :param path: without links on the way
        """
        self._devices.discard(path)
        status = self._lstat(path)
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode):
            if path not in self._own:
                self._unlink(path, status)
            return
        self._hide_content(path)
        if path not in self._own:
            os.rmdir(path, dir_fd=self._root)
            self._bytes -= extract.BLOCK
            self._parents = {b'': b''}
            self._times.pop(path, None)
            self._attributes.forget(path)

    def _hide_content(self, path: bytes) -> None:
        fd = self._open_directory(path or b'.')
        try:
            names = os.listdir(fd)
        finally:
            os.close(fd)
        for name in names:
            self.hide(_join(path, os.fsencode(name)))

    def _open_directory(self, path: bytes) -> int:
        return os.open(
            path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            dir_fd=self._root)

    # Entries

    def _entry(self, member: tarfile.TarInfo, stored: int) -> None:
        if '.wh.' not in member.name:
            return super()._entry(member, stored)
        name = member.name
        parts = archive.split_name(name, self._limits)
        marks = [part for part in parts if part.startswith(_WHITEOUT)]
        if not marks:
            return super()._entry(member, stored)
        if any(part.startswith(_AUFS) and (part, part) != (
                _OPAQUE, parts[-1]) for part in marks):
            self._notes['records of AUFS'] += 1
            return
        if marks != parts[-1:] or member.isdir():
            raise archive.unsafe(
                name, 'a whiteout cannot be a directory')
        hidden = parts[-1].removeprefix(_WHITEOUT)
        if hidden in (b'', b'.', b'..'):
            raise archive.unsafe(name, 'this whiteout names no file')
        parent = self._lower(name, parts[:-1])
        if parent is None:
            return
        if parts[-1] == _OPAQUE:
            self._hide_content(parent)
        else:
            self.hide(_join(parent, hidden))

    def _lower(self, name: str, parts: list[bytes]) -> bytes | None:
        """The directory of a whiteout, or None if it is not there."""
        path = b''
        for part in parts:
            path = _join(path, part)
            status = self._lstat(path)
            if status is None:
                return None
            if not stat.S_ISDIR(status.st_mode):
                if path in self._own:
                    # It has hidden what was below; umoci says so again.
                    return None
                what = 'a symbolic link' if stat.S_ISLNK(
                    status.st_mode) else 'not a directory'
                raise archive.unsafe(
                    name, f'{archive.show(path)} on the way of this whiteout '
                    f'is {what}')
        return path

    def _make(
        self, member: tarfile.TarInfo, path: bytes, stored: int
    ) -> None:
        # A link to itself says that the file is there.
        if not member.isdir() and not member.islnk():
            self._displace(member.name, path)
        super()._make(member, path, stored)
        while path and path not in self._own:
            self._own.add(path)
            path = path.rpartition(b'/')[0]

    def _displace(self, name: str, path: bytes) -> None:
        if path in self._own:
            # As in a root archive.
            super()._displace(name, path)
        else:
            self.hide(path)

    def _directory(self, member: tarfile.TarInfo, path: bytes) -> None:
        status = self._lstat(path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            self._strip(path)
        super()._directory(member, path)

    def _strip(self, path: bytes) -> None:
        """Take away the attributes that an entry replaces."""
        self._attributes.forget(path)
        fd = self._open_directory(path)
        try:
            for name in os.listxattr(fd):
                if (name.startswith('user.') or
                        name in posixacl.XATTRS.values()):
                    os.removexattr(fd, name)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
        finally:
            os.close(fd)
