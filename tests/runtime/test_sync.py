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

"""Copies of an upper: what is in it, and what changes between passes."""

import mmap
import os
import shutil
import socket
import struct
import time

from tests.runtime import sync_base
from tests.runtime.sync_base import BASE
from tests.runtime.sync_base import MIB

#: user::rwx, user:BASE+7:r-x, group::r--, mask::rwx, other::---
ACL = struct.pack('<I', 2) + b''.join(
    struct.pack('<HHI', tag, bits, ident) for tag, bits, ident in (
        (1, 7, 0xffffffff), (2, 5, BASE + 7), (4, 4, 0xffffffff),
        (16, 7, 0xffffffff), (32, 0, 0xffffffff)))
#: cap_net_raw+ep of the guest's own root: revision 3.
CAPABILITY = struct.pack('<IIIIII', 0x03000001, 1 << 13, 0, 0, 0, BASE)


class TestContents(sync_base.Case):
    """Everything that a guest can make arrives as it was."""

    def setUp(self):
        super().setUp()
        layer = self.layer
        for name in ('etc', 'usr/bin', 'usr/lib/gone', 'var/lib/old'):
            (layer / name).mkdir(parents=True)
        (layer / 'etc/hosts').write_text('127.0.0.1 localhost')
        (layer / 'etc/removed').write_text('soon gone')
        (layer / 'usr/bin/tool').write_bytes(b'\x7fELF' + os.urandom(5000))
        (layer / 'usr/lib/gone/file').write_text('with its directory')
        (layer / 'var/lib/old/file').write_text('of the replaced directory')
        self.a.mount()
        self.r = self.a.root

    def check(self):
        self.move()
        self.assert_same()
        self.assert_same_view()

    def test_nothing(self):
        self.check()

    def test_owners_and_modes(self):
        for i, mode in enumerate((0, 0o400, 0o644, 0o755, 0o1777, 0o2755,
                                  0o4755, 0o6777)):
            path = self.r / f'file-{i}'
            path.write_text(str(i))
            os.chown(path, BASE + i * 1000, BASE + 65535 - i)
            path.chmod(mode)
            path = self.r / f'directory-{i}'
            path.mkdir()
            os.chown(path, BASE + i, BASE)
            path.chmod(mode)
        os.chown(self.r / 'etc/hosts', BASE + 33, BASE + 34)
        self.check()

    def test_times(self):
        for i, at in enumerate((
                0, 1, 123456789_123456789, -86400 * 10**9 + 1,
                2**31 * 10**9 + 5, 4_000_000_000_000_000_001)):
            for path in (self.r / f'file-{i}', self.r / f'link-{i}',
                         self.r / f'directory-{i}'):
                if 'file' in path.name:
                    path.write_text('x')
                elif 'link' in path.name:
                    path.symlink_to('x')
                else:
                    path.mkdir()
                    (path / 'entry').write_text('y')
                os.utime(path, ns=(at, at), follow_symlinks=False)
        self.check()

    def test_attributes(self):
        path = self.r / 'file'
        path.write_text('x')
        os.setxattr(path, 'user.empty', b'')
        os.setxattr(path, 'user.binary', bytes(range(256)))
        os.setxattr(path, 'user.long', os.urandom(3000))
        directory = self.r / 'directory'
        directory.mkdir()
        os.setxattr(directory, 'user.of-directory', b'1')
        os.setxattr(self.r / 'etc/hosts', 'user.copied-up', b'1')
        self.check()
        # and what is taken away again goes there too
        os.removexattr(path, 'user.long')
        os.setxattr(path, 'user.empty', b'no more')
        self.one(final=True)
        self.assert_same()

    def test_access_control_lists(self):
        path = self.r / 'file'
        path.write_text('x')
        directory = self.r / 'directory'
        directory.mkdir()
        os.setxattr(path, 'system.posix_acl_access', ACL)
        os.setxattr(directory, 'system.posix_acl_access', ACL)
        os.setxattr(directory, 'system.posix_acl_default', ACL)
        (directory / 'inherits').write_text('x')
        (directory / 'below').mkdir()
        self.assertIn('system.posix_acl_access',
                      os.listxattr(directory / 'inherits'))
        os.setxattr(self.r / 'usr/bin/tool', 'system.posix_acl_access', ACL)
        self.check()
        os.removexattr(path, 'system.posix_acl_access')
        self.one(final=True)
        self.assert_same()

    def test_capabilities(self):
        path = self.r / 'ping'
        path.write_bytes(b'x' * 100)
        os.chown(path, BASE, BASE)
        os.setxattr(path, 'security.capability', CAPABILITY)
        os.setxattr(self.r / 'usr/bin/tool', 'security.capability',
                    CAPABILITY)
        self.check()
        self.assertEqual(CAPABILITY, os.getxattr(
            self.b.upper / 'ping', 'security.capability'))
        # the contents change, so rsync writes it again
        path.write_bytes(b'y' * 100)
        os.setxattr(path, 'security.capability', CAPABILITY)
        self.check()

    def test_security_labels_stay(self):
        path = self.r / 'file'
        path.write_text('x')
        os.setxattr(self.a.upper / 'file', 'security.selinux', b'a:b:c:s0')
        self.move()
        self.assertEqual([], os.listxattr(self.b.upper / 'file'))

    def test_names(self):
        names = [b'with space', b'new\nline', b'tab\t', b'\xff\xfe\x80',
                 b'-dash', b'--delete', b'quote"\'', b'$(touch x)', b'*',
                 b'back\\slash', b'\\#012', b'x' * 255, b':colon', b'a::b',
                 b'.rsync-filter', b'.cvsignore', b'CVS', b'core',
                 b'.file.aBcDeF', b'.~tmp~', 'ünïcode'.encode(),
                 b'end 0 since 1', b'\x01\x1b[31m', b'[a-z]', b'{}', b'~']
        root = os.fsencode(self.r)
        for directory in (root, os.path.join(root, b'dir \xff\n')):
            if directory != root:
                os.mkdir(directory)
            for name in names:
                with open(os.path.join(directory, name), 'wb') as f:
                    f.write(name)
                os.link(os.path.join(directory, name),
                        os.path.join(directory, b'L' + name[:200]))
        with open(os.path.join(root, b'.rsync-filter'), 'wb') as f:
            f.write(b'- *\n')
        self.check()
        for name in names:
            with open(os.path.join(root, name), 'r+b') as f:
                f.write(b'!')
        self.check()

    def test_deep(self):
        path = self.r
        for i in range(100):
            path = path / f'{i:030d}'
            path.mkdir()
            (path / 'file').write_text(str(i))
        self.check()

    def test_other_files(self):
        os.mkfifo(self.r / 'fifo', 0o640)
        with socket.socket(socket.AF_UNIX) as s:
            here = os.open(self.r, os.O_PATH)
            s.bind(f'/proc/self/fd/{here}/socket')
            os.close(here)
        (self.r / 'dangling').symlink_to('/does/not/exist')
        (self.r / 'absolute').symlink_to('/etc/hosts')
        (self.r / 'outside').symlink_to('../../../../../../etc/passwd')
        (self.r / 'loop').symlink_to('loop')
        (self.r / 'long').symlink_to('x' * 4000)
        (self.r / 'empty').write_bytes(b'')
        self.check()

    def test_hard_links(self):
        for i in range(3):
            (self.r / f'file-{i}').write_text(str(i))
            for directory in ('etc', 'usr', f'new-{i}'):
                (self.r / directory).mkdir(exist_ok=True)
                os.link(self.r / f'file-{i}',
                        self.r / directory / f'link-{i}')
        (self.r / 'symlink').symlink_to('target')
        os.link(self.r / 'symlink', self.r / 'symlink-2',
                follow_symlinks=False)
        os.mkfifo(self.r / 'fifo')
        os.link(self.r / 'fifo', self.r / 'etc/fifo')
        self.check()

    def test_sparse(self):
        path = self.r / 'image'
        with open(path, 'wb') as f:
            f.write(b'begin')
            f.seek(40 * MIB)
            f.write(b'middle')
            f.truncate(80 * MIB)
        self.check()
        for side in (self.a, self.b):
            self.assertLess(
                (side.upper / 'image').stat().st_blocks * 512, MIB)
        # Data becomes zeros, and a hole data; in place.
        with open(path, 'r+b') as f:
            f.write(bytes(5))
            f.seek(20 * MIB)
            f.write(os.urandom(MIB))
            f.seek(40 * MIB)
            f.write(bytes(6))
        self.check()
        self.assertLess(
            (self.b.upper / 'image').stat().st_blocks * 512, 3 * MIB)

    def test_removed_and_replaced(self):
        (self.r / 'etc/removed').unlink()
        shutil.rmtree(self.r / 'usr/lib/gone')
        shutil.rmtree(self.r / 'var/lib/old')
        (self.r / 'var/lib/old').mkdir()
        (self.r / 'var/lib/old/new').write_text('another one')
        upper = self.a.upper
        self.assertEqual(0, (upper / 'etc/removed').lstat().st_rdev)
        self.assertEqual(b'y', os.getxattr(
            upper / 'var/lib/old', 'trusted.overlay.opaque'))
        self.check()
        self.assertEqual(b'y', os.getxattr(
            self.b.upper / 'var/lib/old', 'trusted.overlay.opaque'))

    def test_renamed_directory_of_the_layer(self):
        """Nothing is redirected: it would name a place in the layer, and
        hard links there would not be found by their names.
        """
        error = self.assertRaises(
            OSError, os.rename, self.r / 'usr/lib', self.r / 'usr/lib64')
        self.assertEqual(18, error.errno)  # EXDEV: mv(1) copies then
        shutil.move(self.r / 'usr/lib', self.r / 'usr/lib64')
        self.assertTrue((self.r / 'usr/lib64/gone/file').exists())
        self.check()

    def test_time_of_access(self):
        """Reading the guest's files leaves no trace in them."""
        for name in ('file', 'etc/hosts'):
            path = self.r / name
            path.write_text('x' * 10000)
            os.utime(path, ns=(10**18, 1700000000 * 10**9))
        self.move()
        for name in ('file', 'etc/hosts'):
            self.assertEqual(
                10**18, (self.a.upper / name).stat().st_atime_ns)

    def test_no_attributes_of_the_source_host(self):
        (self.r / 'etc/hosts').write_text('changed')
        os.link(self.r / 'etc/hosts', self.r / 'etc/hosts2')
        self.assertIn('trusted.overlay.origin',
                      os.listxattr(self.a.upper / 'etc'))
        self.move()
        for path in (self.b.upper, *self.b.upper.rglob('*')):
            self.assertEqual(
                [], [x for x in os.listxattr(path, follow_symlinks=False)
                     if x in sync_base.HOST_XATTRS], path)
        self.assert_same_view()


class TestChanges(sync_base.Case):
    """What changes between passes arrives, however it was changed."""

    def setUp(self):
        super().setUp()
        (self.layer / 'etc').mkdir()
        for i in range(5):
            (self.layer / f'etc/f{i}').write_text(f'of the layer {i}')
        self.a.mount()
        self.r = self.a.root

    def write(self, name, text, mtime=1_600_000_000):
        path = self.r / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        os.utime(path, (mtime, mtime))

    def age(self):
        """What was done so far was not done right before the next pass."""
        time.sleep(1.2)

    def test_replaced_with_the_same_size_and_time(self):
        for i in range(4):
            self.write(f'f{i}', f'before {i}')
        self.one()
        self.write('f0', 'in place')
        self.write('new', 'by renam')
        os.rename(self.r / 'new', self.r / 'f1')
        self.one()
        self.write('f2', 'in place')
        self.write('f0', 'in again')
        stats = self.one(final=True)
        self.assertTrue(stats.complete)
        self.assert_same()
        self.assertEqual('in again', (self.b.upper / 'f0').read_text())

    def map(self, name):
        (self.r / name).write_bytes(bytes(64 << 10))
        f = open(self.r / name, 'r+b')
        self.addCleanup(f.close)
        m = mmap.mmap(f.fileno(), 0)
        self.addCleanup(m.close)
        return m

    def test_a_second_store_to_a_mapping(self):
        """It leaves no trace in the inode, unless the page was written out.
        """
        m = self.map('mapped')
        m[0:5] = b'first'
        self.age()
        self.one()
        m[0:5] = b'again'
        self.one(final=True)
        self.assert_same()

    def test_stores_to_a_mapping_during_a_pass(self):
        m = self.map('mapped')
        self.one()
        with self.half_way(0) as (server, valve, _, end):
            # Dirty pages have been written out, and nothing was copied yet.
            m[0:5] = b'first'
            valve.go.set()
            self.assertTrue(end().complete)
            self.mark = server.mark
        m[0:5] = b'again'
        self.one(final=True)
        self.assert_same()

    def test_stores_to_a_mapping_after_a_final_pass(self):
        """It was in vain: the guest went on."""
        m = self.map('mapped')
        self.one()
        m[0:5] = b'first'
        self.one(final=True)
        self.assert_same()
        m[0:5] = b'again'
        self.one(final=True)
        self.assert_same()
        m[0:5] = b'third'
        self.one()
        self.assert_same()

    def test_every_type_becomes_every_other(self):
        makers = {
            'file': lambda p: p.write_text('file'),
            'link': lambda p: p.symlink_to('elsewhere'),
            'fifo': lambda p: os.mkfifo(p),
            'directory': lambda p: (p.mkdir(), (p / 'x').write_text('x')),
            'whiteout': lambda p: None,
        }

        def fill(shift):
            kinds = list(makers)
            for i in range(len(kinds)):
                after = kinds[(i + shift) % len(kinds)]
                path = self.r / 'etc' / f'f{i}'
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.is_symlink() or path.exists():
                    path.unlink()
                makers[after](path)

        for shift in range(6):
            fill(shift)
            self.one()
        fill(0)
        self.one(final=True)
        self.assert_same()
        self.assert_same_view()

    def test_separated_hard_links(self):
        """Two names of one file become two files with one time and size."""
        self.write('a', 'contents')
        os.link(self.r / 'a', self.r / 'b')
        os.link(self.r / 'a', self.r / 'c')
        self.one()
        self.assertEqual(3, (self.b.upper / 'a').stat().st_nlink)
        shutil.copy2(self.r / 'b', self.r / 'tmp')
        os.rename(self.r / 'tmp', self.r / 'b')
        self.one()
        self.assert_same()
        shutil.copy2(self.r / 'c', self.r / 'tmp')
        os.rename(self.r / 'tmp', self.r / 'c')
        with open(self.r / 'a', 'a') as f:
            f.write('more')
        self.one(final=True)
        self.assert_same()
        self.assertEqual('contents', (self.b.upper / 'b').read_text())

    def test_regrouped_hard_links(self):
        for name in 'ab':
            self.write(name, name)
            for i in range(3):
                os.link(self.r / name, self.r / f'{name}{i}')
        self.one()
        os.rename(self.r / 'a0', self.r / 'x')
        os.rename(self.r / 'b0', self.r / 'a0')
        os.rename(self.r / 'x', self.r / 'b0')
        (self.r / 'a1').unlink()
        os.link(self.r / 'b', self.r / 'a1')
        self.one(final=True)
        self.assert_same()

    def test_directories_that_change_places(self):
        """Files in them did not change, and have all one size and time."""
        for name in ('current', 'next'):
            for i in range(3):
                self.write(f'{name}/sub/{i}', f'{name:8}{i}')
                self.write(f'{name}/{i}', f'{name:8}{i}')
        self.age()
        self.one()
        self.one()
        os.rename(self.r / 'current', self.r / 'old')
        os.rename(self.r / 'next', self.r / 'current')
        os.rename(self.r / 'old', self.r / 'next')
        self.one(final=True)
        self.assert_same()

    def test_nothing_is_looked_into_twice(self):
        """Files that did not change are not read again."""
        for i in range(50):
            self.write(f'd/{i}', str(i))
        self.one()
        self.age()
        self.age()
        self.one()
        self.assertEqual(0, self.one().transferred)
        self.write('d/7', 'changed')
        self.assertEqual(1, self.one().transferred)
        stats = self.one(final=True)
        self.assertLessEqual(stats.transferred, 1)
        self.assertEqual(0, stats.literal_bytes)
        self.assert_same()

    def test_only_what_changed_of_a_file_crosses(self):
        path = self.r / 'database'
        path.write_bytes(os.urandom(16 * MIB))
        self.one()
        with open(path, 'r+b') as f:
            f.seek(5 * MIB)
            f.write(os.urandom(1000))
        stats = self.one(final=True)
        self.assertLess(stats.received, MIB)
        self.assert_same()

    def test_a_directory_that_was_there(self):
        """A copy that knows nothing of what it finds trusts none of it."""
        self.write('a', 'contents')
        self.write('b', 'contents')
        self.one()
        (self.b.upper / 'b').unlink()
        os.link(self.b.upper / 'a', self.b.upper / 'b')
        (self.b.upper / 'stray').mkdir()
        (self.b.upper / 'stray/x').write_text('x')
        self.write('a', 'CONTENTS')
        self.mark = None
        self.one(copy=sync_base.sync.Copy(self.b.upper))
        self.assert_same()

    def test_the_clock_was_set_back(self):
        self.write('a', 'contents')
        self.one()
        # as if it had been an hour later then
        self.mark = sync_base.sync.Mark(
            self.mark.realtime + 3600, self.mark.monotonic)
        self.write('a', 'CONTENTS')
        self.one(final=True)
        self.assert_same()

    def test_figures(self):
        self.write('a', 'x' * 1000)
        self.write('b', 'y' * 500)
        stats = self.one()
        self.assertEqual(
            (True, 2, 1500, 1500), (stats.complete, stats.transferred,
                                    stats.total_bytes, stats.literal_bytes))
        self.assertGreater(stats.received, 1500)
        (self.r / 'a').unlink()
        stats = self.one(final=True)
        self.assertEqual(1, stats.deleted)
        self.assertEqual(stats.files, stats.to_dict()['files'])
