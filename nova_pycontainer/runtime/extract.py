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

"""Writing the entries of an untrusted root archive into a directory.

It is safe by itself, and is run in a sandbox all the same (see unpack.py):
every path that a system call gets is relative to the root's descriptor and
free of symbolic links, because the links on the way were followed here, in
user space, within the root. No one else writes there at the same time.

What becomes of each kind of entry:

* Files, directories, symbolic links, hard links and fifos are made, with
  numeric owner, all mode bits, time to the nanosecond, and holes.
* Set-user-id and set-group-id bits are kept: a container's root is an
  ordinary user of the host, so they give nothing outside of it, and without
  them sudo and ping do not work. The layers' directory is closed to all
  users of the host for the same reason: on disk these files belong to uid 0.
* Device nodes under ``dev/`` are left out, since the runtime makes /dev.
  Anywhere else they are refused.
* Whiteouts of OCI layers (``.wh.*``) are plain names here. They mean
  something between the layers of an image (see layering.py), and this is one
  root file system.
* An entry that occurs twice replaces the first one. What is not a directory
  never replaces a directory.
"""

import collections
import errno
import os
import stat
import tarfile
import typing as ty

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import fileattrs
from nova_pycontainer.runtime import unpack_job

#: On-disk ids of a layer: those of one container.
MAX_ID: ty.Final = 0xffff
#: Space is counted as the disk gives it out: a million files of one byte
#: are four gigabytes.
BLOCK: ty.Final = 4096
_MAX_SYMLINKS: ty.Final = 40  # as the kernel's MAXSYMLINKS
_CACHED_PARENTS: ty.Final = 8192


def blocks(size: int) -> int:
    """The disk space that ``size`` bytes take."""
    return -(-size // BLOCK) * BLOCK


class Extractor:
    """Unpacks one archive into the empty directory ``root_fd``.

    :param max_bytes: disk space that the files may take
    """

    def __init__(
        self, root_fd: int, reader: archive.Reader, limits: archive.Limits,
        max_bytes: int,
    ) -> None:
        self._root = root_fd
        self._reader = reader
        self._limits = limits
        self._max_bytes = max_bytes
        #: What files with holes take, by inode.
        self._sparse: dict[int, int] = {}
        self._entries = 0
        self._bytes = 0
        self._next_check = 0
        self._notes: collections.Counter[str] = collections.Counter()
        #: Parents as the archive names them, and where they really are.
        self._parents: dict[bytes, bytes] = {b'': b''}
        #: A directory's time changes with each entry made in it, so it is
        #: set at the end.
        self._times: dict[bytes, int] = {}
        self._devices: set[bytes] = set()
        self._attributes = fileattrs.Attributes(root_fd, self._notes)

    def run(self) -> unpack_job.Result:
        """Unpack all entries.

        :raises ContainerError: one of the ``image_*`` codes, ``no_space``,
            ``unsupported``
        """
        self._unpack()
        return self._finish()

    def _unpack(self) -> None:
        for member, stored in archive.members(self._reader):
            self._count_entry(member.name)
            try:
                self._entry(member, stored)
            except OSError as e:
                raise self._oserror(member.name, e) from e
            except errors.ContainerError as e:
                # The decompressor does not know whose data it reads.
                if e.code == 'image_truncated' and ' entry ' not in str(e):
                    e.cause = (f'in entry {archive.show(member.name)}: '
                               f'{e.cause}')
                raise

    # Limits

    def _count_entry(self, name: str) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise errors.ContainerError(
                'image_too_many_entries',
                f'the image has more than {self._limits.entries} entries',
                cause=f'reached at entry {archive.show(name)}',
                remedy='Use a smaller image, or raise the limit in the '
                'configuration of pycontainer-agent')
        if not self._entries % 4096:
            self._check_free(name, 0)

    def _count_bytes(self, name: str | bytes, size: int) -> None:
        self._bytes += blocks(size)
        if self._bytes > self._max_bytes:
            raise archive.too_large(
                f'the image needs more than the {self._max_bytes} bytes of '
                f'disk that it may take (reached at entry '
                f'{archive.show(name)})',
                'Choose a flavor with a larger disk or a smaller image')
        if self._bytes >= self._next_check:
            self._check_free(name, size)

    def _check_free(self, name: str | bytes, size: int) -> None:
        disk = os.fstatvfs(self._root)
        free = disk.f_bavail * disk.f_frsize - size
        # Some file systems make inodes as they go and say 0 of 0.
        inodes = disk.f_favail if disk.f_files else 1 << 20
        if free < self._limits.min_free_bytes or inodes < 8192:
            raise errors.ContainerError(
                'no_space', 'the disk of the layer store is nearly full',
                cause=f'{max(free, 0)} bytes and {inodes} inodes would be '
                f'left at entry {archive.show(name)}',
                remedy='Delete unused layers or add space')
        self._next_check = self._bytes + min(
            64 << 20, free - self._limits.min_free_bytes)

    def _oserror(self, name: str, e: OSError) -> errors.ContainerError:
        if e.errno in errors.FULL:
            return errors.ContainerError(
                'no_space', 'the disk of the layer store is full',
                cause=f'{e.strerror} at entry {archive.show(name)}',
                remedy='Delete unused layers or add space')
        if e.errno == errno.EFBIG:
            return archive.too_large(
                f'entry {archive.show(name)} is larger than a file may be',
                'Use an image without such a file')
        if e.errno == errno.EOPNOTSUPP:
            return errors.ContainerError(
                'unsupported', 'the disk of the layer store cannot keep '
                'extended attributes or access control lists',
                cause=f'{e.strerror} at entry {archive.show(name)}',
                remedy='Keep layers on ext4, XFS or Btrfs')
        return archive.unsafe(name, f'the kernel refused it: {e.strerror}')

    # Names

    def _lstat(self, path: bytes) -> os.stat_result | None:
        try:
            return os.stat(path, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _place(self, name: str, parts: list[bytes]) -> bytes:
        """Return the path of an entry, without links up to its last part."""
        parent = b'/'.join(parts[:-1])
        real = self._parents.get(parent)
        if real is None:
            real = self._walk(name, parts[:-1], make=True)
            if len(self._parents) >= _CACHED_PARENTS:
                self._parents = {b'': b''}
            self._parents[parent] = real
        path = real + b'/' + parts[-1] if real else parts[-1]
        if (len(path) > self._limits.path_bytes or
                path.count(b'/') >= self._limits.depth):
            raise archive.unsafe(
                name, 'links lead to a place that is too deep')
        return path

    def _walk(self, name: str, parts: list[bytes], *, make: bool) -> bytes:
        """Follow ``parts`` from the root, with links, as chroot(2) would.

        An absolute link starts at the root again: ``/var/run -> /run`` is
        how images are built. A link that climbs above the root is refused,
        although chroot would stop it there: no honest image has one with
        entries behind it.

        :param make: make directories that are missing
        """
        todo = parts[::-1]
        done: list[bytes] = []
        links = 0
        while todo:
            part = todo.pop()
            if part in (b'', b'.'):
                continue
            if part == b'..':
                if not done:
                    raise archive.unsafe(
                        name, 'a symbolic link on its way leads out of the '
                        'root')
                done.pop()
                continue
            done.append(part)
            path = b'/'.join(done)
            status = self._lstat(path)
            if status is None:
                if not make:
                    raise archive.unsafe(
                        name, f'there is no {archive.show(path)} before it')
                # Directories that the archive leaves out.
                if len(done) > self._limits.depth:
                    raise archive.unsafe(
                        name, 'links lead to a place that is too deep')
                self._count_entry(name)
                self._count_bytes(name, BLOCK)
                os.mkdir(path, 0o755, dir_fd=self._root)
            elif stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MAX_SYMLINKS:
                    raise archive.unsafe(
                        name, 'symbolic links on its way form a loop')
                target = os.readlink(path, dir_fd=self._root)
                done.pop()
                if target.startswith(b'/'):
                    done.clear()
                todo.extend(reversed(target.split(b'/')))
            elif not stat.S_ISDIR(status.st_mode):
                raise archive.unsafe(
                    name, f'{archive.show(path)} on its way is not a '
                    f'directory')
        return b'/'.join(done)

    def _displace(self, name: str, path: bytes) -> None:
        """Remove an earlier entry at ``path``, if there is one."""
        self._devices.discard(path)
        status = self._lstat(path)
        if status is None:
            return
        if stat.S_ISDIR(status.st_mode):
            raise archive.unsafe(name, 'it would replace a directory')
        self._unlink(path, status)

    def _unlink(self, path: bytes, status: os.stat_result) -> None:
        """Remove what is no directory, and give its space back."""
        os.unlink(path, dir_fd=self._root)
        # It may have been a link to a directory.
        self._parents = {b'': b''}
        self._attributes.forget(path)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            size = self._sparse.pop(status.st_ino, None)
            self._bytes -= blocks(status.st_size) if size is None else size

    # Entries

    def _entry(self, member: tarfile.TarInfo, stored: int) -> None:
        name = member.name
        if member.type == b'V':  # GNU tar --label
            return
        parts = archive.split_name(name, self._limits)
        for ident, what in ((member.uid, 'user'), (member.gid, 'group')):
            if not 0 <= ident <= MAX_ID:
                raise archive.unsafe(
                    name, f'its {what} id {ident} is not within 0 to {MAX_ID}')
        if not parts:
            if not member.isdir():
                raise archive.unsafe(name, 'it would replace the root')
            self._directory(member, b'.')
            return
        self._make(member, self._place(name, parts), stored)

    def _make(
        self, member: tarfile.TarInfo, path: bytes, stored: int
    ) -> None:
        """Make an entry at ``path``, whose directory is there."""
        name = member.name
        kind = member.type
        if member.isdir():
            self._directory(member, path)
        elif member.issym():
            self._symlink(member, path)
        elif member.islnk():
            self._hard_link(member, path)
        elif member.isfifo():
            self._displace(name, path)
            os.mkfifo(path, 0o600, dir_fd=self._root)
            self._finish_special(member, path)
            os.chmod(path, member.mode & 0o7777, dir_fd=self._root)
        elif member.ischr() or member.isblk():
            if not path.startswith(b'dev/'):
                raise archive.unsafe(
                    name, f'it is a device node ({member.devmajor}:'
                    f'{member.devminor}) outside of dev/')
            self._devices.add(path)
            self._notes['device nodes under dev/'] += 1
        elif kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE,
                      tarfile.GNUTYPE_SPARSE):
            self._file(member, path, stored)
        else:
            raise archive.unsafe(name, f'its type {archive.show(kind)} is '
                                       f'not known')

    def _metadata(self, member: tarfile.TarInfo, fd: int, path: bytes) -> None:
        # In this order: a change of owner clears set-id bits and
        # capabilities, an ACL changes mode bits.
        os.fchown(fd, member.uid, member.gid)
        if member.pax_headers:
            self._attributes.set(member, fd, path)
        os.fchmod(fd, member.mode & 0o7777)

    def _directory(self, member: tarfile.TarInfo, path: bytes) -> None:
        if path != b'.':
            status = self._lstat(path)
            if status is None or not stat.S_ISDIR(status.st_mode):
                self._displace(member.name, path)
                self._count_bytes(path, BLOCK)
                os.mkdir(path, 0o700, dir_fd=self._root)
        fd = os.open(
            path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            dir_fd=self._root)
        try:
            self._metadata(member, fd, path)
        finally:
            os.close(fd)
        self._times[path] = archive.time_ns(member)

    def _symlink(self, member: tarfile.TarInfo, path: bytes) -> None:
        # The target is data: a link may point anywhere, as long as nothing
        # is unpacked through it.
        target = member.linkname.encode('utf-8', 'surrogateescape')
        if not target or b'\0' in target or len(target) > 4095:
            raise archive.unsafe(member.name, 'its target is not a path')
        self._displace(member.name, path)
        os.symlink(target, path, dir_fd=self._root)
        self._finish_special(member, path)

    def _finish_special(self, member: tarfile.TarInfo, path: bytes) -> None:
        os.chown(path, member.uid, member.gid, dir_fd=self._root,
                 follow_symlinks=False)
        ns = archive.time_ns(member)
        os.utime(path, ns=(ns, ns), dir_fd=self._root, follow_symlinks=False)
        for key in member.pax_headers:
            if key.startswith(fileattrs.KEYS):
                self._notes['attributes of links and fifos'] += 1

    def _hard_link(self, member: tarfile.TarInfo, path: bytes) -> None:
        name = member.name
        try:
            parts = archive.split_name(member.linkname, self._limits)
        except errors.ContainerError as e:
            raise archive.unsafe(
                name, f'it links to {archive.show(member.linkname)}: '
                f'{e.cause}') from None
        if not parts:
            raise archive.unsafe(name, 'it links to the root directory')
        parent = self._walk(name, parts[:-1], make=False)
        target = parent + b'/' + parts[-1] if parent else parts[-1]
        if target in self._devices:
            self._devices.add(path)
            self._notes['device nodes under dev/'] += 1
            return
        status = self._lstat(target)
        if status is None:
            raise archive.unsafe(
                name, f'it links to {archive.show(target)}, which is not in '
                f'the archive before it')
        if stat.S_ISDIR(status.st_mode):
            raise archive.unsafe(
                name, f'it is a hard link to the directory '
                f'{archive.show(target)}')
        if target == path:
            return  # GNU tar writes this for a file that was added twice
        self._displace(name, path)
        # A symbolic link is linked itself, never what it points to.
        os.link(target, path, src_dir_fd=self._root, dst_dir_fd=self._root,
                follow_symlinks=False)

    def _file(
        self, member: tarfile.TarInfo, path: bytes, stored: int
    ) -> None:
        name = member.name
        if member.size > self._limits.file_bytes:
            raise archive.too_large(
                f'entry {archive.show(name)} has {member.size} bytes, more '
                f'than the {self._limits.file_bytes} of one file',
                'Use an image without such a file')
        pieces = self._pieces(member, stored)
        # Before the first byte is written: a file that cannot fit is not
        # begun.
        # Of a piece between holes, all blocks that it touches.
        taken = sum(blocks(offset % BLOCK + size) for offset, size in pieces)
        self._count_bytes(name, taken)
        flags = (os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW |
                 os.O_CLOEXEC)
        try:
            fd = os.open(path, flags, 0o600, dir_fd=self._root)
        except FileExistsError:
            self._displace(name, path)
            fd = os.open(path, flags, 0o600, dir_fd=self._root)
        try:
            for offset, size in pieces:
                if member.sparse is not None:
                    os.lseek(fd, offset, os.SEEK_SET)
                self._copy(fd, size, name)
            if member.sparse is not None:
                os.ftruncate(fd, member.size)
                self._sparse[os.fstat(fd).st_ino] = taken
            self._metadata(member, fd, path)
            ns = archive.time_ns(member)
            os.utime(fd, ns=(ns, ns))
        finally:
            os.close(fd)

    def _pieces(
        self, member: tarfile.TarInfo, stored: int
    ) -> list[tuple[int, int]]:
        """Return offset and size of the data of a file."""
        if member.sparse is None:
            return [(0, member.size)] if member.size else []
        # typeshed has its type wrong. Old GNU headers pad the map with zeros.
        sparse = [piece for piece in ty.cast(
            list[tuple[int, int]], member.sparse) if piece[1]]
        end = total = 0
        for offset, size in sparse:
            if offset < end or size < 0 or offset + size > member.size:
                raise archive.unsafe(
                    member.name, 'its map of holes is not in order')
            end = offset + size
            total += size
        if total > stored or self._reader.tell() != member.offset_data:
            raise archive.unsafe(
                member.name, 'its map of holes says more than it holds')
        return sparse

    def _copy(self, fd: int, size: int, name: str) -> None:
        while size:
            piece = self._reader.chunk(min(size, archive.CHUNK))
            if not piece:
                raise archive.truncated(
                    f'the archive ends within entry {archive.show(name)}')
            size -= len(piece)
            while piece:
                piece = piece[os.write(fd, piece):]

    def _finish(self) -> unpack_job.Result:
        if not self._entries:
            raise errors.ContainerError(
                'image_not_archive', 'the archive has no entries',
                remedy=archive.REPACK)
        try:
            self._attributes.finish()
        except OSError as e:
            raise self._oserror('(access control lists)', e) from e
        for path, ns in self._times.items():
            os.utime(path, ns=(ns, ns), dir_fd=self._root,
                     follow_symlinks=False)
        return unpack_job.Result(self._entries, self._bytes, dict(self._notes))
