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

"""Reading an untrusted root archive: formats, limits, headers and names.

Nothing here touches a file system. The archive is a stream that is read
once, forwards; no copy of it is kept, and each buffer has a fixed size.
tarfile parses the headers; what it tolerates and we must not (a damaged
header that it takes for the end, a header of any size) is refused here.
"""

import collections.abc as cabc
import dataclasses
import io
import lzma
import tarfile
import typing as ty
import zlib

from oslo_utils.imageutils import format_inspector
import zstandard

from nova_pycontainer.runtime import errors

#: Bytes of one read and of one piece of decompressed data.
CHUNK: ty.Final = 256 << 10
#: Bytes of the start of an image that are kept to tell what it is. The
#: farthest signature known is that of VHDX, with its region table at 192 KiB.
HEAD: ty.Final = 320 << 10
#: zstd's own default limit (2^27). A larger window needs ``--long`` to make
#: and as much memory to read.
_ZSTD_WINDOW: ty.Final = 128 << 20
#: ``xz -9`` needs 65 MiB.
_XZ_MEMORY: ty.Final = 256 << 20
#: Size limit of one PAX or GNU header. Attributes and names take a few KiB.
_HEADER_BYTES: ty.Final = 256 << 10
#: What one call may turn into output cannot be limited in the zstandard
#: library: 4 bytes may become 128 KiB, so 4 KiB of input 128 MiB at most.
_ZSTD_SLICE: ty.Final = 4 << 10

REPACK: ty.Final = (
    'Give Nova a tar archive of the root file system, plain or compressed '
    'with gzip, xz or zstd')


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


def disk_format(head: bytes) -> str | None:
    """Name the disk image or file system that starts with ``head``.

    oslo.utils knows the formats of virtual disks and partition tables. Bare
    file systems it does not; those that people upload as ``raw`` are told by
    their magic numbers (magic(5), ``include/uapi/linux/magic.h``).
    """
    for name, offset, magic in (
        ('squashfs', 0, b'hsqs'),
        ('xfs', 0, b'XFSB'),
        ('ext2/3/4', 1080, b'\x53\xef'),
        ('erofs', 1024, b'\xe2\xe1\xf5\xe0'),
        ('f2fs', 1024, b'\x10\x20\xf5\xf2'),
        ('btrfs', 0x10040, b'_BHRfS_M'),
    ):
        if head[offset:offset + len(magic)] == magic:
            return name
    wrapper = format_inspector.InspectWrapper(
        io.BytesIO(head), allowed_formats=[
            name for name in format_inspector.ALL_FORMATS if name != 'raw'])
    # In pieces, as the inspectors expect it from a file.
    while wrapper.read(4096):
        pass
    wrapper.close()
    try:
        found = wrapper.formats
    except format_inspector.ImageFormatError:
        return None
    return '/'.join(sorted(str(i) for i in found)) if found else None


#: Packings that people may try; to be told apart from random bytes is kind.
_OTHERS: ty.Final = (
    (b'BZh', 'a bzip2 file'), (b'\x04\x22\x4d\x18', 'an lz4 file'),
    (b'PK\x03\x04', 'a zip archive'), (b'7z\xbc\xaf\x27\x1c', 'a 7z archive'),
    (b'0707', 'a cpio archive'), (b'!<arch>\n', 'an ar archive'),
    (b'\x5d\x00\x00', 'an lzma file'), (b'\xed\xab\xee\xdb', 'an rpm'),
    (b'Rar!', 'a rar archive'), (b'<', 'a web page or XML'),
)


def compression(head: bytes) -> str | None:
    """Return ``gzip``, ``xz`` or ``zstd``, by magic number; never by name."""
    if head.startswith(b'\x1f\x8b'):
        return 'gzip'
    if head.startswith(b'\xfd7zXZ\0'):
        return 'xz'
    # A zstd file may begin with a skippable frame (RFC 8878 §3.1.2); pzstd
    # writes one.
    if head.startswith(b'\x28\xb5\x2f\xfd') or (
            head[1:4] == b'\x2a\x4d\x18' and head[0] & 0xf0 == 0x50):
        return 'zstd'
    return None


def check_is_tar(head: bytes, packed: str | None) -> None:
    """Raise unless ``head`` begins a tar archive.

    :param head: the start of the (decompressed) image
    :param packed: the compression around it
    :raises ContainerError: ``image_is_disk``, ``image_not_archive``,
        ``image_truncated``
    """
    around = f' in {packed}' if packed else ''
    try:
        tarfile.TarInfo.frombuf(head[:512], 'utf-8', 'surrogateescape')
        return
    except tarfile.HeaderError:
        pass
    except ValueError:
        pass
    if not head:
        if packed:
            raise truncated(f'nothing came out of its {packed} data')
        raise errors.ContainerError(
            'image_not_archive', 'the image is empty', remedy=REPACK)
    disk = disk_format(head)
    if disk:
        raise errors.ContainerError(
            'image_is_disk', f'the image is a disk image ({disk}{around}), '
            f'not an archive of a root file system',
            remedy=REPACK + ', or boot this image on a hypervisor for '
            'virtual machines')
    if not head.strip(b'\0'):
        what = 'only zero bytes'
    elif compression(head):
        what = f'{compression(head)} data'
    else:
        what = next(
            (text for magic, text in _OTHERS if head.startswith(magic)),
            'of no known format')
    raise errors.ContainerError(
        'image_not_archive', 'the image is not an archive',
        cause=f'what it holds{around} is {what}', remedy=REPACK)


class _Codec(ty.Protocol):
    """What lzma.LZMADecompressor looks like."""

    @property
    def eof(self) -> bool:
        ...

    @property
    def unused_data(self) -> bytes:
        ...

    @property
    def needs_input(self) -> bool:
        ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        ...


class _Gzip:
    """zlib with lzma's way of holding back output."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        out = self._zlib.decompress(
            self._zlib.unconsumed_tail + data, max_length)
        # zlib may hold output back although all input is consumed.
        self.needs_input = (
            not self._zlib.unconsumed_tail and len(out) < max_length)
        return out


class _Zstd:
    """zstandard with lzma's interface. See :data:`_ZSTD_SLICE`."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(
            max_window_size=_ZSTD_WINDOW).decompressobj()
        self._input = b''
        self._at = 0

    @property
    def eof(self) -> bool:
        return bool(self._zstd.eof)

    @property
    def needs_input(self) -> bool:
        return self._at >= len(self._input)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._zstd.unused_data) + self._input[self._at:]

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        if data:
            self._input = self._input[self._at:] + data
            self._at = 0
        piece = self._input[self._at:self._at + _ZSTD_SLICE]
        self._at += len(piece)
        return bytes(self._zstd.decompress(piece))


_CODECS: ty.Final[dict[str, ty.Callable[[], _Codec]]] = {
    'gzip': _Gzip,
    'xz': lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
    'zstd': _Zstd,
}
_CODEC_ERRORS: ty.Final = (zlib.error, lzma.LZMAError, zstandard.ZstdError)


def decompress(
    packed: str, source: cabc.Iterator[bytes]
) -> cabc.Iterator[bytes]:
    """Yield the decompressed pieces of a stream of one or more frames.

    All three formats allow several streams one after another, and zeros
    after them. The checksums at their ends are verified.

    :raises ContainerError: ``image_truncated``, ``image_not_archive``
    """
    codec: _Codec | None = None
    data = b''
    ended = False
    try:
        while True:
            if codec is None:
                data = data.lstrip(b'\0')
                while not data and not ended:
                    data = next(source, b'')
                    ended = not data
                    data = data.lstrip(b'\0')
                if not data:
                    return
                # A magic number may be cut in two by the source's pieces.
                while len(data) < 6 and not ended:
                    more = next(source, b'')
                    ended = not more
                    data += more
                if compression(data) != packed:
                    raise errors.ContainerError(
                        'image_not_archive', f'other data follows the '
                        f'{packed} data of the image', remedy=REPACK)
                codec = _CODECS[packed]()
            elif codec.needs_input and not ended:
                data = next(source, b'')
                ended = not data
            out = codec.decompress(data, CHUNK)
            data = b''
            if out:
                yield out
            if codec.eof:
                data = codec.unused_data
                codec = None
            elif ended and not out and codec.needs_input:
                raise truncated(f'its {packed} data ends too early')
    except _CODEC_ERRORS as e:
        raise truncated(f'{packed}: {e}') from e


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
            raise truncated(f'a header at byte {where} of the archive needs '
                            f'more memory than is allowed') from e
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
