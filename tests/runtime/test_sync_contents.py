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

"""Copies of an upper: what is in it."""

import os
import random
import shutil
import socket
import struct

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

    def test_zeros_and_data_change_places(self):
        """Not with any old rsync: see _SAFE_INPLACE."""
        r = random.Random(5)

        def contents():
            return b''.join(
                bytes(n) if r.random() < 0.5 else r.randbytes(n)
                for n in r.choices((1, 7, 512, 1000, 4096, 5000, 100_000),
                                   k=r.randrange(1, 40)))

        for _ in range(3):
            for i in range(100):
                with open(self.r / str(i), 'wb' if i % 3 else 'ab') as f:
                    f.write(contents())
            self.one()
        self.assert_same()

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
