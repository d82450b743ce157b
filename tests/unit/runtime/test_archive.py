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

"""Reading and unpacking archives: all of it but the sandbox, without root."""

import io
import os
import pathlib
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile

import ddt
import testtools

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import imageformat
from nova_pycontainer.runtime import unpack
from tests import tarballs

LIMITS = archive.Limits(min_free_bytes=0)
MAX_BYTES = 1 << 30


class Case(testtools.TestCase):
    """Unpacks into a directory that lies in one with nothing else in it."""

    def setUp(self):
        super().setUp()
        self.outside = pathlib.Path(tempfile.mkdtemp(prefix='archive-test-'))
        self.addCleanup(shutil.rmtree, self.outside)
        self.root = self.outside / 'root'
        self.root.mkdir()

    def unpack(self, data, *, max_bytes=MAX_BYTES, limits=LIMITS):
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with tempfile.TemporaryFile() as f:
                f.write(data)
                f.seek(0)
                return unpack.unpack(f.fileno(), root_fd, max_bytes, limits)
        finally:
            os.close(root_fd)

    def refuse(self, data, code, text='', **kw):
        error = self.assertRaises(
            errors.ContainerError, self.unpack, data, **kw)
        self.assertEqual((code, True),
                         (error.code, bool(re.search(text, str(error)))),
                         str(error))
        self.assertTrue(error.remedy)
        return error

    def tree(self):
        return sorted(str(p.relative_to(self.root))
                      for p in self.root.rglob('*'))


@ddt.ddt
class TestBadImages(Case):

    @ddt.data(*sorted(tarballs.BAD))
    def test_refused(self, name):
        image, code, text = tarballs.BAD[name]
        self.refuse(image, code, text)
        self.assertEqual(['root'], os.listdir(self.outside))
        self.assertFalse(list(self.root.rglob('*evil*')))


@ddt.ddt
class TestFormats(Case):

    def check(self, image):
        result = self.unpack(image)
        self.assertEqual(10, result.entries)
        self.assertEqual(b'ID=test\nVERSION_ID="1.0"\n',
                         (self.root / 'etc/os-release').read_bytes())
        self.assertTrue((self.root / 'usr/bin/sh').exists())

    @ddt.data(*tarballs.PACKERS)
    def test_each(self, packer):
        self.check(tarballs.PACKERS[packer](tarballs.system().bytes()))

    @ddt.data('gzip', 'xz', 'zstd')
    def test_several_frames(self, packer):
        data = tarballs.system().bytes()
        pack = tarballs.PACKERS[packer]
        self.check(pack(data[:700]) + pack(b'') + pack(data[700:]))

    @ddt.data('gzip', 'xz')
    def test_zeros_after_the_last_frame(self, packer):
        data = tarballs.PACKERS[packer](tarballs.system().bytes())
        self.check(data + bytes(4096))

    def test_zstd_that_starts_with_a_skippable_frame(self):
        skippable = b'\x53\x2a\x4d\x18\x04\0\0\0abcd'
        self.check(skippable + tarballs.zstd(tarballs.system().bytes()))

    def test_zstd_of_the_highest_level_and_a_large_window(self):
        self.check(tarballs.zstd(tarballs.system().bytes(), level=19))

    def test_old_tar(self):
        # No "ustar" in it, so it is told by its checksum alone.
        block = tarballs.header('f', 1, at_257=bytes(8))
        self.unpack(block + b'x'.ljust(512, b'\0') + bytes(1024))
        self.assertEqual(b'x', (self.root / 'f').read_bytes())

    @ddt.data(tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT)
    def test_dialects(self, kind):
        name = 'd/' * 40 + 'f' * 50
        tar = tarballs.Tar(format=kind).add(name, b'x')
        self.unpack(tar.bytes())
        self.assertEqual(b'x', (self.root / name).read_bytes())

    def test_volume_label(self):
        self.unpack(tarballs.Tar().raw(tarballs.header('label', kind=b'V'))
                    .add('f').bytes())
        self.assertEqual(['f'], self.tree())

    def test_pieces_of_one_byte(self):
        # A pipe may give as little as that.
        data = tarballs.zstd(tarballs.system().bytes())
        out = b''.join(imageformat.decompress(
            'zstd', iter([data[i:i + 1] for i in range(len(data))])))
        self.assertEqual(tarballs.system().bytes(), out)


class TestLimits(Case):

    def test_entries(self):
        tar = tarballs.Tar()
        for i in range(11):
            tar.add(f'f{i}')
        limits = archive.Limits(min_free_bytes=0, entries=10)
        self.refuse(tar.bytes(), 'image_too_many_entries', "'f10'",
                    limits=limits)

    def test_directories_that_no_entry_names_count(self):
        tar = tarballs.Tar().add('a/b/c/d/e/f/g/h/i/j/k')
        limits = archive.Limits(min_free_bytes=0, entries=10)
        self.refuse(tar.bytes(), 'image_too_many_entries', limits=limits)

    def test_bytes(self):
        tar = tarballs.Tar().add('a', bytes(40_000)).add('b', bytes(30_000))
        self.refuse(tar.bytes(), 'image_too_large', "65536 .*'b'.*flavor",
                    max_bytes=1 << 16)
        # What does not fit is not begun.
        self.assertEqual(['a'], self.tree())

    def test_small_files_cost_a_block(self):
        tar = tarballs.Tar()
        for i in range(20):
            tar.add(f'f{i}', b'x')
        self.refuse(tar.bytes(), 'image_too_large', max_bytes=1 << 16)

    def test_space_of_a_file_that_is_replaced(self):
        tar = tarballs.Tar()
        for _ in range(20):
            tar.add('f', bytes(8000))
        self.assertEqual(8192, self.unpack(tar.bytes()).bytes)
        (self.root / 'f').unlink()
        # It still has another name.
        self.refuse(tar.link('g', 'f').add('f', b'x').bytes(),
                    'image_too_large', max_bytes=8192)

    def test_pieces_between_holes_cost_their_blocks(self):
        tar = tarballs.Tar().add('f', b'x' * 1024, pax={
            'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
            'GNU.sparse.size': '1048576',
            'GNU.sparse.map': '4000,512,65536,512'})
        self.assertEqual(3 * 4096, self.unpack(tar.bytes()).bytes)
        self.assertEqual(
            3 * 8, (self.root / 'f').stat().st_blocks)
        (self.root / 'f').unlink()
        self.assertEqual(4096, self.unpack(tar.add('f', b'y').bytes()).bytes)

    def test_size_of_one_file(self):
        limits = archive.Limits(min_free_bytes=0, file_bytes=1000)
        self.refuse(tarballs.Tar().add('f', bytes(1001)).bytes(),
                    'image_too_large', "'f'", limits=limits)

    def test_ratio(self):
        limits = archive.Limits(
            min_free_bytes=0, ratio=20, ratio_floor=1 << 20)
        data = tarballs.Tar().add('zeros', bytes(8 << 20)).bytes()
        for packer in ('gzip', 'xz', 'zstd'):
            self.refuse(tarballs.PACKERS[packer](data), 'image_too_large',
                        'times its size.*sparse', limits=limits)
            (self.root / 'zeros').unlink(missing_ok=True)
        self.unpack(data, limits=limits)

    def test_free_space_that_must_stay(self):
        limits = archive.Limits(min_free_bytes=1 << 60)
        self.refuse(tarballs.Tar().add('f', b'x').bytes(), 'no_space',
                    'nearly full', limits=limits)

    def test_pieces_are_bounded(self):
        # A gigabyte of zeros in a few KiB must not become one buffer.
        for packer in ('gzip', 'xz', 'zstd'):
            data = tarballs.PACKERS[packer](bytes(256 << 20))
            largest = max(
                len(piece) for piece in imageformat.decompress(
                    packer, iter([data])))
            self.assertLessEqual(largest, 128 << 20, packer)

    def test_window_of_zstd(self):
        compressor = tarballs.zstandard.ZstdCompressor(
            compression_params=tarballs.zstandard.ZstdCompressionParameters(
                window_log=28))
        buffer = io.BytesIO()
        with compressor.stream_writer(buffer, closefd=False) as writer:
            writer.write(tarballs.system().bytes())
        self.refuse(buffer.getvalue(), 'image_too_large', 'zstd.*memory')


class TestEntries(Case):

    def make(self, **kw):
        return tarballs.Tar(**kw)

    def test_kinds_modes_and_times(self):
        tar = (self.make()
               .dir('d', mode=0o1777, mtime=1.5)
               .add('d/suid', b'x', mode=0o4755)
               .add('d/sgid', b'x', mode=0o2755)
               .add('d/old', b'x', mode=0o600, mtime=1_700_000_000,
                    pax={'mtime': '1700000000.123456789'})
               .add('d/ancient', mtime=0, pax={'mtime': '-1.5'})
               .add('d/pipe', kind=tarfile.FIFOTYPE, mode=0o620)
               .symlink('d/s', '/nowhere', mtime=7)
               .link('d/h', 'd/suid'))
        self.unpack(tar.bytes())
        status = {p.name: p.lstat() for p in self.root.rglob('*')}
        self.assertEqual(
            {'d': 0o1777, 'suid': 0o4755, 'sgid': 0o2755, 'old': 0o600,
             'ancient': 0o644, 'pipe': 0o620, 'h': 0o4755},
            {k: stat.S_IMODE(v.st_mode) for k, v in status.items()
             if k != 's'})
        self.assertTrue(stat.S_ISFIFO(status['pipe'].st_mode))
        self.assertEqual(1_700_000_000_123_456_789,
                         status['old'].st_mtime_ns)
        self.assertEqual(-1_500_000_000, status['ancient'].st_mtime_ns)
        self.assertEqual(1_500_000_000, status['d'].st_mtime_ns)
        self.assertEqual(7, status['s'].st_mtime)
        self.assertEqual('/nowhere', os.readlink(self.root / 'd/s'))
        self.assertEqual(status['h'].st_ino, status['suid'].st_ino)

    def test_times_that_are_none(self):
        tar = self.make()
        times = ['inf', '-inf', 'nan', 'x', '', '1e99', '9' * 5000, '.5',
                 '-9' + '9' * 40, '9' * 40, '1.x', '1.-1']
        for i, time in enumerate(times):
            tar.add(f'f{i}', pax={'mtime': time})
        self.unpack(tar.bytes())
        self.assertEqual(len(times), len(self.tree()))

    def test_metadata_of_the_root(self):
        self.unpack(self.make().dir('./', mode=0o711, mtime=9).add('./f')
                    .bytes())
        status = self.root.stat()
        self.assertEqual((0o711, 9),
                         (stat.S_IMODE(status.st_mode), status.st_mtime))

    def test_entries_behind_a_link_within_the_root(self):
        tar = (self.make()
               .symlink('bin', 'usr/bin').symlink('var/run', '/run')
               .dir('run').dir('usr/bin').symlink('lib', './usr/../usr/lib')
               .add('bin/sh', b's').add('var/run/pid', b'p')
               .add('lib/so', b'l'))
        self.unpack(tar.bytes())
        self.assertEqual(b's', (self.root / 'usr/bin/sh').read_bytes())
        self.assertEqual(b'p', (self.root / 'run/pid').read_bytes())
        self.assertEqual(b'l', (self.root / 'usr/lib/so').read_bytes())
        self.assertEqual('/run', os.readlink(self.root / 'var/run'))

    def test_link_that_points_out_is_data(self):
        self.unpack(self.make().symlink('l', '../../../etc/shadow').bytes())
        self.assertEqual('../../../etc/shadow',
                         os.readlink(self.root / 'l'))

    def test_hard_link_to_a_symbolic_link_links_the_link(self):
        secret = self.outside / 'secret'
        secret.write_text('secret')
        self.addCleanup(secret.unlink)
        tar = (self.make().symlink('s', str(secret)).link('h', 's')
               .add('h', b'evil'))
        self.unpack(tar.bytes())
        self.assertEqual('secret', secret.read_text())
        self.assertEqual(1, secret.stat().st_nlink)
        self.assertEqual(b'evil', (self.root / 'h').read_bytes())
        self.assertTrue((self.root / 's').is_symlink())

    def test_the_last_of_two_entries_wins(self):
        tar = (self.make().add('f', b'one').add('f', b'two')
               .symlink('l', 'f').add('l', b'file now')
               .add('g', b'x').symlink('g', 'f')
               .dir('d', mode=0o700).add('d/x').dir('d', mode=0o755)
               .symlink('m', 'd').dir('m').add('m/y'))
        self.unpack(tar.bytes())
        self.assertEqual(b'two', (self.root / 'f').read_bytes())
        self.assertEqual(b'file now', (self.root / 'l').read_bytes())
        self.assertFalse((self.root / 'l').is_symlink())
        self.assertEqual('f', os.readlink(self.root / 'g'))
        self.assertEqual(0o755,
                         stat.S_IMODE((self.root / 'd').stat().st_mode))
        self.assertTrue((self.root / 'd/x').exists())
        self.assertFalse((self.root / 'm').is_symlink())
        self.assertTrue((self.root / 'm/y').exists())
        self.assertFalse((self.root / 'd/y').exists())

    def test_replaced_link_is_not_followed_from_memory(self):
        tar = (self.make().dir('a').dir('b').symlink('l', 'a').add('l/1')
               .symlink('l', 'b').add('l/2'))
        self.unpack(tar.bytes())
        self.assertEqual(['a', 'a/1', 'b', 'b/2', 'l'],
                         [n for n in self.tree() if n[:2] != 'l/'])

    def test_file_added_twice_by_gnu_tar(self):
        self.unpack(self.make().add('f', b'x').link('f', 'f').bytes())
        self.assertEqual(b'x', (self.root / 'f').read_bytes())

    def test_devices_under_dev_are_left_out(self):
        tar = (self.make().dir('dev').device('dev/null')
               .device('./dev/zero', dev=(1, 5))
               .device('dev/sda', tarfile.BLKTYPE, dev=(8, 0))
               .link('dev/null2', 'dev/null').dir('dev/pts')
               .symlink('dev/fd', '/proc/self/fd').add('f'))
        result = self.unpack(tar.bytes())
        self.assertEqual(['dev', 'dev/fd', 'dev/pts', 'f'],
                         [n for n in self.tree()
                          if not n.startswith('dev/fd/')])
        self.assertEqual({'device nodes under dev/': 4}, result.notes)

    def test_whiteouts_of_container_layers_are_plain_names(self):
        self.unpack(self.make().add('etc/.wh.passwd').add('.wh..wh..opq')
                    .bytes())
        self.assertEqual(['.wh..wh..opq', 'etc', 'etc/.wh.passwd'],
                         self.tree())

    def test_missing_parents_are_made(self):
        self.unpack(self.make().add('a/b/f').bytes())
        self.assertEqual(0o755,
                         stat.S_IMODE((self.root / 'a/b').stat().st_mode))

    def test_names_that_are_not_utf8(self):
        name = b'caf\xe9'.decode('utf-8', 'surrogateescape')
        for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            self.unpack(self.make(format=kind).add(name).bytes())
            self.assertEqual([b'caf\xe9'],
                             os.listdir(os.fsencode(self.root)))

    def test_strange_but_harmless_names(self):
        names = ['a\nb', 'c d', '-rf', 'e\x1b[0m', '...', '. .', '\u202e']
        tar = self.make()
        for name in names:
            tar.add(name)
        self.unpack(tar.bytes())
        self.assertEqual(sorted(names), sorted(os.listdir(self.root)))

    def test_control_characters_do_not_reach_a_message(self):
        error = self.refuse(self.make().add('../\x1b[31m\n').bytes(),
                            'image_unsafe_entry')
        self.assertTrue(str(error).isprintable())

    def test_directory_without_write_permission(self):
        # Not for root, who writes anyway.
        self.unpack(self.make().dir('d', mode=0o555).bytes())
        self.assertEqual(0o555,
                         stat.S_IMODE((self.root / 'd').stat().st_mode))


@ddt.ddt
class TestHoles(Case):

    SIZE = 8 << 20

    def _source(self):
        path = self.outside / 'source'
        with open(path, 'wb') as f:
            f.write(b'start')
            f.seek(4 << 20)
            f.write(b'middle')
            f.truncate(self.SIZE)
        self.addCleanup(path.unlink)
        return path

    def _check(self):
        status = (self.root / 'source').stat()
        self.assertEqual(self.SIZE, status.st_size)
        self.assertLess(status.st_blocks * 512, 1 << 20)
        with open(self.root / 'source', 'rb') as f:
            self.assertEqual(b'start' + bytes(11), f.read(16))
            f.seek(4 << 20)
            self.assertEqual(b'middle', f.read(6))
            self.assertFalse(f.read().strip(b'\0'))

    @ddt.data(['--format=gnu'], ['--format=posix', '--sparse-version=0.0'],
              ['--format=posix', '--sparse-version=0.1'],
              ['--format=posix', '--sparse-version=1.0'])
    def test_of_gnu_tar(self, options):
        # The one program that writes all four forms.
        self._source()
        out = self.outside / 'tar'
        self.addCleanup(out.unlink)
        subprocess.run(
            ['tar', '--sparse', *options, '-C', self.outside, '-cf', out,
             'source'], check=True)
        self.assertLess(out.stat().st_size, 1 << 20)
        result = self.unpack(out.read_bytes())
        self._check()
        self.assertLess(result.bytes, 1 << 20)

    def test_file_that_is_one_hole(self):
        self.unpack(tarballs.Tar().add('f', pax={
            'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
            'GNU.sparse.size': '1048576', 'GNU.sparse.map': '1048576,0'})
            .bytes())
        status = (self.root / 'f').stat()
        self.assertEqual((1 << 20, 0), (status.st_size, status.st_blocks))
