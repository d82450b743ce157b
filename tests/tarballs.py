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

"""Root archives for the tests, good ones and every kind of bad one."""

import bz2
import gzip
import io
import lzma
import os
import platform
import random
import struct
import tarfile
import zipfile

import zstandard

#: The tests write as who they are; in the sandbox that is always uid 0.
UID, GID = os.getuid(), os.getgid()


def elf(machine=62, bits=2, order=1):
    """The header of an ELF program; as much as anybody reads of it."""
    ident = b'\x7fELF' + bytes([bits, order, 1, 0]) + bytes(8)
    return ident + struct.pack('<>'[order == 2] + 'HH', 2, machine) + bytes(44)


class Tar:
    """Writes tar entries as they are told, however wrong they may be."""

    def __init__(self, format=tarfile.PAX_FORMAT, uid=UID, gid=GID):
        self.format = format
        self.uid, self.gid = uid, gid
        self.parts = []

    def add(self, name, data=b'', *, kind=tarfile.REGTYPE, mode=None,
            uid=None, gid=None, mtime=1_700_000_000, link='', pax=None,
            dev=(1, 3), size=None):
        info = tarfile.TarInfo(name)
        info.type = kind
        if mode is None:
            mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        info.mode = mode
        info.uid = self.uid if uid is None else uid
        info.gid = self.gid if gid is None else gid
        info.mtime = mtime
        info.linkname = link
        info.size = len(data) if size is None else size
        info.devmajor, info.devminor = dev
        info.pax_headers = pax or {}
        self.parts.append(
            info.tobuf(self.format, 'utf-8', 'surrogateescape'))
        self.parts.append(data + bytes(-len(data) % 512))
        return self

    def dir(self, name, **kw):
        return self.add(name, kind=tarfile.DIRTYPE, **kw)

    def symlink(self, name, target, **kw):
        return self.add(name, kind=tarfile.SYMTYPE, link=target, **kw)

    def link(self, name, target, **kw):
        return self.add(name, kind=tarfile.LNKTYPE, link=target, **kw)

    def device(self, name, kind=tarfile.CHRTYPE, **kw):
        return self.add(name, kind=kind, **kw)

    def raw(self, data):
        self.parts.append(data)
        return self

    def bytes(self, end=bytes(10240)):
        return b''.join(self.parts) + end


def header(name='f', size=0, kind=b'0', **fields):
    """One header block with fields overwritten and the checksum right.

    :param fields: offset (as ``at_124``) to bytes
    """
    info = tarfile.TarInfo(name)
    info.size, info.type, info.uid, info.gid = size, kind, UID, GID
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    for key, value in fields.items():
        at = int(key.removeprefix('at_'))
        block[at:at + len(value)] = value
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    return bytes(block)


def system(uid=UID, gid=GID):
    """A small root file system with an init for this machine's kind."""
    machine = {'x86_64': 62, 'aarch64': 183}[platform.machine()]
    return (Tar(uid=uid, gid=gid).dir('./').dir('./etc').dir('./usr')
            .dir('./usr/bin').dir('./usr/sbin')
            .symlink('./bin', 'usr/bin').symlink('./sbin', 'usr/sbin')
            .add('./etc/os-release', b'ID=test\nVERSION_ID="1.0"\n')
            .add('./usr/sbin/init', elf(machine), mode=0o755)
            .add('./bin/sh', elf(machine), mode=0o755))


def zstd(data, level=3):
    return zstandard.ZstdCompressor(level=level).compress(data)


PACKERS = {
    'plain': lambda data: data,
    'gzip': lambda data: gzip.compress(data, 1),
    'xz': lambda data: lzma.compress(data, preset=0),
    'zstd': zstd,
}

_random = random.Random(7)
NOISE = _random.randbytes(200_000)


def _qcow2():
    head = struct.pack('>4sIQIIQIIQQIIQ', b'QFI\xfb', 3, 0, 0, 16, 1 << 30,
                       0, 2, 0x30000, 0x10000, 1, 0, 0)
    return head + struct.pack('>QQQII', 0, 0, 0, 4, 104) + bytes(1 << 16)


def _vmdk():
    # A sparse extent with its descriptor in sector 1.
    descriptor = (b'# Disk DescriptorFile\nversion=1\nCID=fffffffe\n'
                  b'parentCID=ffffffff\ncreateType="monolithicSparse"\n'
                  b'RW 2048 SPARSE "d.vmdk"\n')
    head = struct.pack('<4sIIQQQQIQQQB', b'KDMV', 1, 3, 2048, 128, 1, 20,
                       512, 21, 26, 128, 0)
    return (head.ljust(512, b'\0') + descriptor).ljust(1 << 17, b'\0')


def _vdi():
    return (b'<<< Oracle VM VirtualBox Disk Image >>>\n'.ljust(64, b'\0') +
            struct.pack('<II', 0xbeda107f, 0x10001)).ljust(1 << 16, b'\0')


def _at(offset, magic, size=1 << 17):
    return bytes(offset) + magic + bytes(size)


def _iso():
    return _at(0x8000, b'\x01CD001\x01\0' + b'LINUX'.ljust(32))


def _gpt():
    mbr = bytearray(512)
    mbr[446:462] = struct.pack('<B3sB3sII', 0, b'\0\2\0', 0xee, b'\xff' * 3,
                               1, 2047)
    mbr[510:] = b'\x55\xaa'
    return bytes(mbr) + b'EFI PART'.ljust(1 << 16, b'\0')


def _zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as z:
        z.writestr('sbin/init', b'x')
    return buffer.getvalue()


def _one(*args, **kw):
    """A sound archive with one more entry."""
    return system().add(*args, **kw).bytes()


def _pax_record(key, value):
    body = b' ' + key.encode() + b'=' + value + b'\n'
    size = len(body)
    while len(str(size)) + len(body) != size:
        size = len(str(size)) + len(body)
    return str(size).encode() + body


def _pax(*records):
    data = b''.join(_pax_record(*record) for record in records)
    return (header('pax', len(data), b'x') + data +
            bytes(-len(data) % 512))


def _deep(count):
    return '/'.join(['d'] * count)


_SYSTEM = system().bytes()
_UNSAFE = 'image_unsafe_entry'

#: Name: image, error code, what the message has to say.
BAD = {
    # What is no archive of a root file system
    'empty': (b'', 'image_not_archive', 'empty'),
    'random bytes': (NOISE, 'image_not_archive', 'no known format'),
    'only zeros': (bytes(1 << 20), 'image_not_archive', 'only zero bytes'),
    'text': (b'<html>404</html>', 'image_not_archive', 'web page'),
    'bzip2': (bz2.compress(_SYSTEM), 'image_not_archive', 'bzip2'),
    'zip': (_zip(), 'image_not_archive', 'zip'),
    'gzip in gzip': (gzip.compress(gzip.compress(_SYSTEM)),
                     'image_not_archive', 'gzip'),
    'random bytes in zstd': (zstd(NOISE), 'image_not_archive', 'zstd'),
    'data after the end': (_SYSTEM + b'more', 'image_not_archive',
                           'after|follows'),
    'two archives in one': (_SYSTEM + _SYSTEM, 'image_not_archive',
                            'follows'),
    'data after gzip': (gzip.compress(_SYSTEM) + b'more data',
                        'image_not_archive', 'follows'),
    # Disk images (CVE-2024-32498, CVE-2026-24708): no tool ever opens one.
    'qcow2': (_qcow2(), 'image_is_disk', 'qcow2'),
    'qcow2 in gzip': (gzip.compress(_qcow2()), 'image_is_disk',
                      'qcow2 in gzip'),
    'vmdk': (_vmdk(), 'image_is_disk', 'vmdk'),
    'vdi': (_vdi(), 'image_is_disk', 'vdi'),
    'vhd': (b'conectix'.ljust(1 << 16, b'\0'), 'image_is_disk', 'vhd'),
    'iso': (_iso(), 'image_is_disk', 'iso'),
    'gpt': (_gpt(), 'image_is_disk', 'gpt'),
    'ext4': (_at(1080, b'\x53\xef'), 'image_is_disk', 'ext'),
    'squashfs': (b'hsqs'.ljust(1 << 16, b'\0'), 'image_is_disk', 'squashfs'),
    'xfs': (b'XFSB'.ljust(1 << 16, b'\0'), 'image_is_disk', 'xfs'),
    'btrfs': (_at(0x10040, b'_BHRfS_M'), 'image_is_disk', 'btrfs'),
    # Cut off or damaged
    'cut in a header': (_SYSTEM[:512 + 100], 'image_truncated', 'end mark'),
    'cut in a file': (system().add('f', NOISE).bytes()[:-100_000],
                      'image_truncated', "entry 'f'"),
    'cut between entries': (system().bytes(b''), 'image_truncated',
                            'end mark'),
    'cut gzip': (gzip.compress(_one('f', NOISE))[:-100_000],
                 'image_truncated', 'gzip'),
    'cut gzip trailer': (gzip.compress(_SYSTEM)[:-4], 'image_truncated',
                         'gzip'),
    'cut xz': (lzma.compress(_one('f', NOISE))[:-100_000],
               'image_truncated', 'xz'),
    'cut xz index': (lzma.compress(_SYSTEM)[:-8], 'image_truncated', 'xz'),
    'cut zstd': (zstd(_one('f', NOISE))[:-100_000], 'image_truncated',
                 'zstd'),
    'cut after magic': (b'\x28\xb5\x2f\xfd', 'image_truncated', 'zstd'),
    'wrong checksum of gzip': (
        gzip.compress(_SYSTEM)[:-8] + b'\0' * 8, 'image_truncated', 'gzip'),
    'damaged zstd': (
        zstd(_one('f', NOISE))[:150_000] + bytes(1000), 'image_truncated',
        'zstd'),
    'damaged header': (
        system().raw(b'x' * 512).bytes(), 'image_truncated', 'header'),
    'negative size': (
        system().raw(header(at_124=b'\xff' * 11 + b'\x00')).bytes(),
        'image_truncated', 'negative'),
    'negative PAX size': (
        system().raw(_pax(('size', b'-512'))).raw(header()).bytes(),
        'image_truncated', 'header'),
    'huge PAX header': (
        system().raw(header('pax', 8 << 30, b'x')).bytes(),
        'image_truncated', 'extended header'),
    'huge GNU long name': (
        system().raw(header('././@LongLink', 8 << 30, b'L')).bytes(),
        'image_truncated', 'extended header'),
    'PAX header upon PAX header': (
        system().raw(_pax(('comment', b'x')) * 5000).raw(header()).bytes(),
        'image_truncated', 'header'),
    'malformed PAX record': (
        system().raw(header('pax', 512, b'x') + b'0 path=x\n' + bytes(503))
        .raw(header()).bytes(), 'image_truncated', 'header'),
    # Names
    'dot dot': (_one('../evil', b'x'), _UNSAFE, "'../evil'.*upwards"),
    'dot dot inside': (_one('etc/../../evil', b'x'), _UNSAFE, 'upwards'),
    'dot dot at the end': (
        system().dir('etc/..').bytes(), _UNSAFE, 'upwards'),
    'absolute': (_one('/etc/evil', b'x'), _UNSAFE, 'absolute'),
    'NUL in a name': (
        system().raw(_pax(('path', b'etc/a\0b'))).raw(header()).bytes(),
        _UNSAFE, 'NUL'),
    'name of 256 bytes': (_one('n' * 256), _UNSAFE, '255'),
    'path of 5000 bytes': (
        _one('/'.join(['n' * 200] * 25)), _UNSAFE, '4095'),
    'path of 129 directories': (_one(_deep(129)), _UNSAFE, 'deep'),
    'root as a file': (_one('.', b'x'), _UNSAFE, 'root'),
    # Links
    'through a link out of the root': (
        system().symlink('out', '../../../../tmp').add('out/evil', b'x')
        .bytes(), _UNSAFE, "'out/evil'.*leads out"),
    'through a link of a link out of the root': (
        system().symlink('a', 'etc/..').symlink('b', 'a/..')
        .add('b/evil', b'x').bytes(), _UNSAFE, "'b/evil'.*leads out"),
    'through a loop of links': (
        system().symlink('a', 'b').symlink('b', 'a').add('a/f').bytes(),
        _UNSAFE, 'loop'),
    'through a file': (
        system().add('f', b'x').add('f/g', b'x').bytes(), _UNSAFE,
        'not a directory'),
    'links to a place too deep': (
        system().symlink('l', _deep(100)).add(f'l/{_deep(100)}/f').bytes(),
        _UNSAFE, 'deep'),
    'link over a directory': (
        system().dir('d').symlink('d', '/tmp').add('d/evil', b'x').bytes(),
        _UNSAFE, "entry 'd'.*replace a directory"),
    'file over a directory': (
        system().add('etc', b'x').bytes(), _UNSAFE, 'replace a directory'),
    'hard link out of the root': (
        system().link('h', '../../etc/passwd').bytes(), _UNSAFE,
        "entry 'h'.*upwards"),
    'absolute hard link': (
        system().link('h', '/etc/passwd').bytes(), _UNSAFE,
        "entry 'h'.*absolute"),
    'hard link through a link out of the root': (
        system().symlink('out', '../../etc').link('h', 'out/passwd').bytes(),
        _UNSAFE, "entry 'h'.*leads out"),
    'hard link to nothing': (
        system().link('h', 'etc/nothing').bytes(), _UNSAFE,
        'not in the archive'),
    'hard link to a directory': (
        system().link('h', 'etc').bytes(), _UNSAFE, 'directory'),
    'hard link to the root': (
        system().link('h', './').bytes(), _UNSAFE, 'root'),
    'empty link': (
        system().symlink('l', '').bytes(), _UNSAFE, 'not a path'),
    # Kinds
    'disk device': (
        system().device('etc/sda', tarfile.BLKTYPE, dev=(8, 0)).bytes(),
        _UNSAFE, '8:0'),
    'null device elsewhere': (
        system().device('etc/null').bytes(), _UNSAFE, 'outside of dev'),
    'device by a link named dev': (
        system().symlink('dev', 'etc').device('dev/sda').bytes(), _UNSAFE,
        'outside of dev'),
    'overlay whiteout': (
        system().device('etc/passwd', dev=(0, 0)).bytes(), _UNSAFE, '0:0'),
    'unknown type': (
        system().raw(header(kind=b'Z')).bytes(), _UNSAFE, 'type'),
    # Owners and attributes
    'owner above 65535': (
        _one('f', uid=65536), _UNSAFE, 'user id 65536'),
    'group above 65535': (
        _one('f', gid=1_000_000), _UNSAFE, 'group id 1000000'),
    'negative owner': (
        system().raw(header(at_108=b'\xff' * 8)).bytes(), _UNSAFE,
        'user id -1'),
    'malformed capability': (
        _one('f', pax={'SCHILY.xattr.security.capability': 'x' * 20}),
        _UNSAFE, 'security.capability'),
    'capability of version 1': (
        _one('f', pax={'SCHILY.xattr.security.capability':
                       '\1\0\0\1' + '\0' * 8}),
        _UNSAFE, 'security.capability'),
    'attribute larger than a block': (
        _one('f', pax={'SCHILY.xattr.user.big': 'x' * 100_000}),
        _UNSAFE, 'user.big'),
    # Holes
    'holes out of order': (
        _one('f', b'x' * 1024, pax={
            'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
            'GNU.sparse.size': '8192',
            'GNU.sparse.map': '4096,512,0,512'}),
        _UNSAFE, 'holes'),
    'holes beyond the end': (
        _one('f', b'x' * 512, pax={
            'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
            'GNU.sparse.size': '512', 'GNU.sparse.map': '4096,512'}),
        _UNSAFE, 'holes'),
    'more data than there is': (
        _one('f', b'x' * 512, pax={
            'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
            'GNU.sparse.size': '1048576', 'GNU.sparse.map': '0,1048576'}),
        _UNSAFE, 'holes'),
    # Size
    'file of a terabyte': (
        system().raw(header('f', 1 << 40)).bytes(), 'image_too_large',
        "entry 'f'"),
    'hole of a petabyte': (
        _one('f', pax={
            'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
            'GNU.sparse.size': str(1 << 50), 'GNU.sparse.map': '0,0'}),
        'image_too_large', "entry 'f'"),
}


def unpack(data, directory):
    """Unpack one of tools/images' systems."""
    with zstandard.open(io.BytesIO(data)) as stream, (
            tarfile.open(fileobj=stream, mode='r|')) as archive:
        archive.extractall(directory)
