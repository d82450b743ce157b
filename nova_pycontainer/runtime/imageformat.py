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

"""What an image is, told by its content, and its decompression.
"""

import collections.abc as cabc
import io
import lzma
import tarfile
import typing as ty
import zlib

from oslo_utils.imageutils import format_inspector
import zstandard

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors

#: Bytes of the start of an image that are kept to tell what it is. The
#: farthest signature known is that of VHDX, with its region table at 192 KiB.
HEAD: ty.Final = 320 << 10
#: zstd's own default limit (2^27). A larger window needs ``--long`` to make
#: and as much memory to read.
_ZSTD_WINDOW: ty.Final = 128 << 20
#: ``xz -9`` needs 65 MiB.
_XZ_MEMORY: ty.Final = 256 << 20
#: What one call may turn into output cannot be limited in the zstandard
#: library: 4 bytes may become 128 KiB, so 4 KiB of input 128 MiB at most.
_ZSTD_SLICE: ty.Final = 4 << 10


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
            raise archive.truncated(f'nothing came out of its {packed} data')
        raise errors.ContainerError(
            'image_not_archive', 'the image is empty', remedy=archive.REPACK)
    disk = disk_format(head)
    if disk:
        raise errors.ContainerError(
            'image_is_disk', f'the image is a disk image ({disk}{around})',
            remedy=archive.REPACK)
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
        cause=f'what it holds{around} is {what}', remedy=archive.REPACK)


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

    :raises ContainerError: ``image_truncated``, ``image_not_archive``,
        ``image_too_large``
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
                        f'{packed} data of the image', remedy=archive.REPACK)
                codec = _CODECS[packed]()
            elif codec.needs_input and not ended:
                data = next(source, b'')
                ended = not data
            out = codec.decompress(data, archive.CHUNK)
            data = b''
            if out:
                yield out
            if codec.eof:
                data = codec.unused_data
                codec = None
            elif ended and not out and codec.needs_input:
                raise archive.truncated(f'its {packed} data ends too early')
    except _CODEC_ERRORS as e:
        # "Memory usage limit exceeded" (xz), "Frame requires too much memory
        # for decoding" (zstd).
        if 'memory' in str(e).lower():
            raise archive.too_much_memory(f'{packed}: {e}') from e
        raise archive.truncated(f'{packed}: {e}') from e
