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

"""Extended attributes and access control lists of archives' files."""

import os
import struct

from nova_pycontainer.runtime import fileattrs
from nova_pycontainer.runtime import posixacl
from tests import tarballs
from tests.unit.runtime import test_archive

PING = struct.pack('<5I', 0x02000001, 1 << 13, 0, 0, 0)


def acl(*entries):
    return struct.pack('<I', 2) + b''.join(
        struct.pack('<HHI', *entry) for entry in entries)


NOBODY = 0xffffffff
ACL = acl((1, 6, NOBODY), (2, 4, 1000), (4, 4, NOBODY), (0x10, 4, NOBODY),
          (0x20, 0, NOBODY))


class TestAttributes(test_archive.Case):

    def test_user_attributes(self):
        self.unpack(tarballs.Tar()
                    .add('f', pax={'SCHILY.xattr.user.mime': 'text'})
                    .dir('d', pax={'SCHILY.xattr.user.x': 'a=b\nc\udcff'})
                    .bytes())
        self.assertEqual(b'text', os.getxattr(self.root / 'f', 'user.mime'))
        self.assertEqual(b'a=b\nc\xff', os.getxattr(self.root / 'd', 'user.x'))

    def test_others_are_left_out(self):
        unwanted = ('trusted.overlay.opaque', 'trusted.x',
                    'user.overlay.redirect', 'security.selinux',
                    'security.ima', 'system.nfs4_acl', 'overlay.x')
        result = self.unpack(tarballs.Tar().add('f', pax={
            f'SCHILY.xattr.{name}': 'y' for name in unwanted}).bytes())
        self.assertEqual([], os.listxattr(self.root / 'f'))
        self.assertEqual(7, sum(result.notes.values()))

    def test_binary_lists(self):
        # Its mode is the list's: owner, mask and others.
        full = acl((1, 7, NOBODY), (2, 4, 1000), (4, 4, NOBODY),
                   (0x10, 4, NOBODY), (0x20, 0, NOBODY))
        value = full.decode('utf-8', 'surrogateescape')
        self.unpack(tarballs.Tar()
                    .dir('d', mode=0o740, pax={
                        'SCHILY.xattr.system.posix_acl_access': value,
                        'SCHILY.xattr.system.posix_acl_default': value})
                    .add('d/f', mode=0o600).bytes())
        for name in ('access', 'default'):
            self.assertEqual(full, os.getxattr(
                self.root / 'd', f'system.posix_acl_{name}'))
        # The directory's default must not change what the archive says.
        self.assertEqual(0o600, (self.root / 'd/f').stat().st_mode & 0o777)

    def test_lists_with_names_of_the_image(self):
        text = 'user::rw-,user:svc:r--,group::r--,mask::r--,other::---'
        tar = (tarballs.Tar().add('f', pax={'SCHILY.acl.access': text})
               .add('g', pax={'SCHILY.acl.access':
                              text.replace('svc', 'unknown')})
               .add('etc/passwd', b'root:x:0:0::/:\nsvc:x:1000:1::/:\n'))
        result = self.unpack(tar.bytes())
        self.assertEqual(ACL, os.getxattr(
            self.root / 'f', 'system.posix_acl_access'))
        self.assertEqual([], os.listxattr(self.root / 'g'))
        self.assertEqual({'access control lists': 1}, result.notes)

    def test_list_of_a_file_that_is_replaced(self):
        self.unpack(tarballs.Tar().add('f', pax={
            'SCHILY.acl.access': 'user::rw-,user:7:r--,group::r--,'
            'mask::r--,other::---'}).add('f').bytes())
        self.assertEqual([], os.listxattr(self.root / 'f'))

    def test_table_of_names_that_is_a_link_is_not_read(self):
        secret = self.outside / 'secret'
        secret.write_text('svc:x:1000:')
        self.addCleanup(secret.unlink)
        tar = (tarballs.Tar().symlink('etc/passwd', str(secret))
               .add('f', pax={'SCHILY.acl.access': 'user:svc:r--'}))
        result = self.unpack(tar.bytes())
        self.assertEqual({'access control lists': 1}, result.notes)

    def test_attributes_of_links_are_left_out(self):
        result = self.unpack(tarballs.Tar().symlink(
            'l', '/etc', pax={'SCHILY.xattr.user.x': 'y'}).bytes())
        self.assertEqual(1, sum(result.notes.values()))


class TestCapability(test_archive.Case):

    def test_version_2_stays(self):
        self.assertEqual(PING, fileattrs.file_capability(PING))

    def test_version_3_loses_its_root(self):
        three = struct.pack('<6I', 0x03000001, 1 << 13, 0, 0, 0, 100_000)
        self.assertEqual(PING, fileattrs.file_capability(three))

    def test_others_are_refused(self):
        for value in (b'', PING[:-1], PING + b'\0\0\0\0', b'\0' * 20,
                      struct.pack('<6I', 0x02000001, 1, 0, 0, 0, 0)):
            self.assertRaises(ValueError, fileattrs.file_capability, value)


class TestAclText(test_archive.Case):

    def test_forms(self):
        want = posixacl.from_text(
            'user::rw-,user:1000:r--,group::r--,mask::r--,other::---', {}, {})
        self.assertEqual(ACL, want)
        for text in (
            'u::rw-\nu:1000:r--\ng::r--\nm::r--\no::---\n',
            'other::---,mask::r--,user:1000:r--,group::r--,user::rw-',
            'user::rw-,user:joe:r--:1000,group::r--,mask::r--,other::---',
            'user::rw-,user:1000:r--  #effective:r--\n'
            'group::r--,mask::r--,other::---',
        ):
            self.assertEqual(want, posixacl.from_text(text, {}, {}), text)

    def test_the_image_knows_its_names_better(self):
        self.assertEqual(
            posixacl.from_text('user:7:r--', {}, {}),
            posixacl.from_text('user:joe:r--:1000', {'joe': 7}, {}))

    def test_malformed(self):
        for text in ('x', 'user:joe:r--', 'user:70000:r--', 'mask:1:r--',
                     'other::rwxx', 'user:1:r', '\0'):
            self.assertRaises(ValueError, posixacl.from_text, text, {}, {})

    def test_names(self):
        self.assertEqual({'a': 1, 'c': 3}, posixacl.names(
            'a:x:1:\nb:x:notanumber\nshort\na:x:9\nc:x:3'))
        self.assertEqual({}, posixacl.names(''))
