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

"""Extended attributes of an untrusted archive's files: which, in what form.

Kept are file capabilities, ``user.*`` and access control lists. Left out are
``trusted.*`` and overlay's own, which would steer the overlay that the layer
becomes a part of, and the other ``security.*``, labels of another host's
policy.
"""

import collections
import errno
import os
import struct
import tarfile
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import posixacl

_XATTR: ty.Final = 'SCHILY.xattr.'
#: PAX records that become attributes start with one of these.
KEYS: ty.Final = (_XATTR, 'SCHILY.acl.')
#: Lists in text form wait in memory until /etc/passwd is there.
_MAX_ACL_TEXT: ty.Final = 16 << 20
_REVISION_MASK: ty.Final = 0xff000000  # include/uapi/linux/capability.h
_V2: ty.Final = 0x02000000
_V3: ty.Final = 0x03000000


def file_capability(value: bytes) -> bytes:
    """Return ``security.capability`` as it has to be written.

    A file capability has a root user in whose user namespaces it counts
    (capabilities(7), "Namespaced file capabilities"). Version 2 leaves it
    out and means the root of whoever writes it. We write version 2 in a user
    namespace, through a mount that maps this namespace's root to 0 on disk.
    The kernel makes version 3 of it, with root id 0 on disk. Seen through the
    idmapped mount of a container, that 0 is the container's own root, so it
    counts there, and in no other container. An archive that holds version
    3 was made from inside a container, whose root's id on that host has no
    meaning here: it becomes version 2, which says "the root of this image".

    :raises ValueError: not a capability of version 2 or 3
    """
    if len(value) in (20, 24):
        magic, = struct.unpack_from('<I', value)
        if (len(value), magic & _REVISION_MASK) in ((20, _V2), (24, _V3)):
            flags = magic & ~_REVISION_MASK
            return struct.pack('<I', _V2 | flags) + value[4:20]
    raise ValueError('security.capability has an unknown version or size')


def _wanted(name: str) -> bool:
    if name.startswith('user.'):
        return not name.startswith('user.overlay.')
    return name in posixacl.XATTRS.values()


class Attributes:
    """Sets the attributes of files as they are unpacked.

    :param notes: counts what was left out
    """

    def __init__(
        self, root_fd: int, notes: 'collections.Counter[str]'
    ) -> None:
        self._root = root_fd
        self._notes = notes
        #: Path and attribute → the list as text.
        self._acls: dict[tuple[bytes, str], str] = {}
        self._acl_text = 0

    def set(self, member: tarfile.TarInfo, fd: int, path: bytes) -> None:
        """Set the attributes of an entry on its open file or directory.

        :raises ContainerError: ``image_unsafe_entry``
        :raises OSError: EOPNOTSUPP: the file system has no attributes
        """
        for key, text in member.pax_headers.items():
            if key in posixacl.XATTRS:
                self._acl_text += len(text) + 64
                if self._acl_text > _MAX_ACL_TEXT:
                    raise archive.unsafe(
                        member.name, 'the image has too many access control '
                        'lists')
                self._acls[path, posixacl.XATTRS[key]] = text
            elif key.startswith(_XATTR):
                self._set(member, fd, key[len(_XATTR):],
                          text.encode('utf-8', 'surrogateescape'))

    def _set(
        self, member: tarfile.TarInfo, fd: int, name: str, value: bytes
    ) -> None:
        if name == 'security.capability' and not member.isdir():
            try:
                value = file_capability(value)
            except ValueError as e:
                raise archive.unsafe(member.name, str(e)) from None
        elif not _wanted(name):
            family = archive.show(name.partition('.')[0][:16])
            self._notes[f'attributes {family}.*'] += 1
            return
        try:
            os.setxattr(fd, name, value)
        except ValueError:
            raise archive.unsafe(
                member.name, 'an attribute name holds a NUL') from None
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                raise
            # ext4 says ENOSPC where attributes exceed one block.
            raise archive.unsafe(
                member.name, f'attribute {archive.show(name)} cannot be '
                f'set: {e.strerror}') from e

    def forget(self, path: bytes) -> None:
        """What was there is gone, and so are the lists that wait for it."""
        for attribute in posixacl.XATTRS.values():
            self._acls.pop((path, attribute), None)

    def finish(self) -> None:
        """Set the lists that named users, now that their table is there."""
        if not self._acls:
            return
        users = posixacl.names(self._table('etc/passwd'))
        groups = posixacl.names(self._table('etc/group'))
        for (path, attribute), text in self._acls.items():
            try:
                value = posixacl.from_text(text, users, groups)
                fd = self._open(path)
            except (ValueError, OSError):
                # An unknown name, or a later entry made a link of the file.
                self._notes['access control lists'] += 1
                continue
            try:
                os.setxattr(fd, attribute, value)
            finally:
                os.close(fd)

    def _open(self, path: bytes | str) -> int:
        # O_NONBLOCK: it may have become a fifo.
        return os.open(
            path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
            dir_fd=self._root)

    def _table(self, path: str) -> str:
        try:
            fd = self._open(path)
        except OSError:
            return ''
        with open(fd, 'rb') as f:
            return f.read(1 << 20).decode('utf-8', 'replace')
