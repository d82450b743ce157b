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

"""Reading an untrusted root archive: its limits, headers and names.

Nothing here touches a file system. The archive is a stream that is read
once, forwards; no copy of it is kept, and each buffer has a fixed size.
tarfile parses the headers; what it tolerates and we must not (a damaged
header that it takes for the end, a header of any size) is refused here.
"""

import collections.abc as cabc
import dataclasses
import tarfile
import typing as ty

from nova_pycontainer.runtime import errors

#: Bytes of one read and of one piece of decompressed data.
CHUNK: ty.Final = 256 << 10
#: Size limit of one PAX or GNU header. Attributes and names take a few KiB.
_HEADER_BYTES: ty.Final = 256 << 10
REPACK: ty.Final = (
    'Upload a tar archive of a root file system (plain, gzip, xz or zstd)')


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one image may cost. Sizes are bytes, times seconds."""

    entries: int = 1_000_000
    #: Disk space of the unpacked files, where the caller gives no limit.
    bytes: int = 64 << 30
    #: Size of one file as stat(2) shows it, holes included.
    file_bytes: int = 1 << 40
    #: Names in a path, and bytes of a path (PATH_MAX without its NUL).
    depth: int = 128
    path_bytes: int = 4095
    #: Unpacked to packed, looked at once more than ratio_floor bytes came
    #: out. Real root file systems lie between 2 and 10; zeros reach 1000
    #: (gzip), 7000 (xz) and 30000 (zstd).
    ratio: int = 200
    ratio_floor: int = 1 << 30
    #: Free space that an import leaves to everybody else on that disk.
    min_free_bytes: int = 512 << 20
    #: RLIMIT_CPU and RLIMIT_AS of the process that unpacks.
    cpu_seconds: int = 1800
    memory_bytes: int = 1 << 30


def show(name: str | bytes) -> str:
    """A name from the archive, safe to log and of bounded length."""
    if isinstance(name, bytes):
        name = name.decode('utf-8', 'surrogateescape')
    text = ascii(name)
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


def unsafe(name: str | bytes, why: str) -> errors.ContainerError:
    """The error for an entry that must not be unpacked."""
    return errors.ContainerError(
        'image_unsafe_entry', f'entry {show(name)} is refused', cause=why,
        remedy='Build the image again without this entry')


def truncated(cause: str) -> errors.ContainerError:
    return errors.ContainerError(
        'image_truncated', 'the image is cut off or damaged', cause=cause,
        remedy='Upload it again and compare its checksum')


def too_large(message: str, remedy: str) -> errors.ContainerError:
    return errors.ContainerError('image_too_large', message, remedy=remedy)


def too_much_memory(cause: str) -> errors.ContainerError:
    return errors.ContainerError(
        'image_too_large', 'unpacking the image takes too much memory',
        cause=cause, remedy='Pack it with the default settings of its '
        'compressor')


def split_name(name: str, limits: Limits) -> list[bytes]:
    """Return the components of an entry's name; none for the root itself.

    Only what can be decided from the name alone is decided here. Symbolic
    links on the way are the business of whoever has the file system.

    :param name: as tarfile gives it: UTF-8 with surrogate escapes
    :raises ContainerError: ``image_unsafe_entry``
    """
    raw = name.encode('utf-8', 'surrogateescape')
    if len(raw) > limits.path_bytes:
        raise unsafe(name, f'its name has {len(raw)} bytes, more than '
                           f'{limits.path_bytes}')
    if not raw:
        raise unsafe(name, 'it has no name')
    if raw.startswith(b'/'):
        raise unsafe(name, 'its name is absolute')
    if b'\0' in raw:
        raise unsafe(name, 'its name holds a NUL')
    parts = [part for part in raw.split(b'/') if part not in (b'', b'.')]
    if b'..' in parts:
        raise unsafe(name, 'its name leads upwards with ".."')
    if len(parts) > limits.depth:
        raise unsafe(name, f'it lies {len(parts)} directories deep, more '
                           f'than {limits.depth}')
    for part in parts:
        if len(part) > 255:
            raise unsafe(name, 'a part of its name is longer than 255 bytes')
    return parts


def time_ns(member: tarfile.TarInfo) -> int:
    """The modification time; exact, where tarfile has made it a float."""
    text = member.pax_headers.get('mtime', '')
    whole, _, fraction = text.partition('.')
    try:
        ns = int(whole) * 10**9
        part = int((fraction + '0' * 9)[:9])
        ns += -part if whole.startswith('-') else part
    except ValueError:
        try:
            ns = int(member.mtime) * 10**9
        except (ValueError, OverflowError):
            ns = 0  # "nan", "inf"
    # What time_t holds; file systems narrow it further by themselves.
    return max(-(2**63), min(ns, 2**63 - 1))


class Reader:
    """A forward-only file over the pieces of a decompressed stream.

    It is what tarfile reads headers from and what file contents are taken
    from without a copy. It also watches the ratio of output to input.

    :param consumed: returns how many bytes of the image were read so far
    """

    def __init__(
        self, pieces: cabc.Iterator[bytes], limits: Limits,
        consumed: ty.Callable[[], int],
    ) -> None:
        self._pieces = pieces
        self._limits = limits
        self._consumed = consumed
        self._view = memoryview(b'')
        self._position = 0
        self.produced = 0

    def _fill(self) -> bool:
        piece = next(self._pieces, b'')
        self._view = memoryview(piece)
        self.produced += len(piece)
        if self.produced > self._limits.ratio_floor:
            packed = max(self._consumed(), 1)
            if self.produced > packed * self._limits.ratio:
                raise too_large(
                    f'the image unpacks to more than {self._limits.ratio} '
                    f'times its size ({packed} bytes gave {self.produced})',
                    'If this is not an attack, store its large empty files '
                    'as sparse ones (tar --sparse)')
        return bool(piece)

    def chunk(self, size: int) -> memoryview:
        """Return 1 to ``size`` bytes, or none at the end of the stream."""
        if not self._view and not self._fill():
            return self._view
        piece = self._view[:size]
        self._view = self._view[len(piece):]
        self._position += len(piece)
        return piece

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end of the stream."""
        first = self.chunk(size)
        if len(first) == size or not first:
            return bytes(first)
        parts = [bytes(first)]
        missing = size - len(first)
        while missing and (piece := self.chunk(missing)):
            parts.append(bytes(piece))
            missing -= len(piece)
        return b''.join(parts)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        missing = position - self._position
        if missing < 0:
            raise ValueError('a header points backwards')
        while missing and (piece := self.chunk(missing)):
            missing -= len(piece)
        return self._position


_HEADER_ERROR: ty.Final = tarfile.HeaderError
#: Not in the type hints of tarfile.
_END_MARK: ty.Final[type[Exception]] = ty.cast(
    ty.Any, tarfile).EOFHeaderError


class _BadHeader(Exception):
    """A header that tarfile would take for the end of the archive."""


class _Member(tarfile.TarInfo):
    """A header that is either sound or an error.

    tarfile stops without a word at a damaged, cut off or missing header
    once the first one was read. And it reads PAX and GNU headers into memory
    whatever their size.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> ty.Self:
        try:
            return super().fromtarfile(tarfile)
        except _END_MARK:
            raise
        except _HEADER_ERROR as e:
            raise _BadHeader(str(e)) from e

    @classmethod
    def frombuf(
        cls, buf: bytes | bytearray, encoding: str, errors: str
    ) -> ty.Self:
        if len(buf) < tarfile.BLOCKSIZE:
            raise _BadHeader('the archive ends without its end mark')
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise _BadHeader('negative size')
        if member.type in (
                tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
                tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
        ) and member.size > _HEADER_BYTES:
            raise _BadHeader(f'an extended header of {member.size} bytes')
        return member


def members(reader: Reader) -> cabc.Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each entry, and the bytes that are stored for it.

    :raises ContainerError: ``image_truncated``, ``image_not_archive``
    """
    tar: tarfile.TarFile | None = None
    while True:
        where = reader.tell()
        try:
            if tar is None:
                tar = tarfile.TarFile(
                    fileobj=ty.cast(ty.IO[bytes], reader), tarinfo=_Member,
                    encoding='utf-8', errors='surrogateescape')
            member = tar.next()
            # Again: a PAX header may have replaced it.
            if member is not None and member.size < 0:
                raise _BadHeader('negative size')
        except (errors.ContainerError, OSError):
            raise
        except MemoryError as e:
            raise too_much_memory(f'at byte {where} of the archive') from e
        except Exception as e:
            # tarfile answers hostile headers with many kinds of errors:
            # its own, ValueError, OverflowError, RecursionError...
            raise truncated(f'bad header at byte {where} of the archive: '
                            f'{show(str(e))}') from e
        if member is None:
            break
        # tarfile keeps all members for random access.
        ty.cast(ty.Any, tar).members.clear()
        yield member, tar.offset - member.offset_data
    while piece := reader.chunk(CHUNK):
        if bytes(piece).strip(b'\0'):
            raise errors.ContainerError(
                'image_not_archive', 'other data follows the end of the '
                'archive', remedy='Join archives with "tar --concatenate", '
                'not with "cat"')
