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
"""Files for a guest, in a tree that an image's maker has set traps in."""

import base64
import os
import pathlib

import ddt
import fixtures

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import guest_files
from tests import cases


@ddt.ddt
class GuestFilesTestCase(cases.TestCase):

    def setUp(self):
        super().setUp()
        top = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.outside = top / 'outside'
        self.outside.mkdir()
        (self.outside / 'file').write_text('of the host')
        self.root = top / 'root'
        (self.root / 'etc').mkdir(parents=True)
        (self.root / 'etc/motd').write_text('of the image')
        (self.root / 'etc/motd').chmod(0o600)

    def write(self, *paths, content=b'given'):
        guest_files.write(
            self.root, [guest_files.File(path, content) for path in paths],
            os.getuid())

    def refused(self, path):
        error = self.assertRaises(
            errors.ContainerError, self.write, path)
        self.assertEqual('file_refused', error.code)
        self.assertIn(path, str(error))
        return str(error)

    def assert_given(self, name, mode=0o644):
        path = self.root / name
        self.assertEqual('given', path.read_text())
        self.assertEqual(mode, path.stat().st_mode & 0o7777)

    def assert_outside_is_untouched(self):
        self.assertEqual(['file'], os.listdir(self.outside))
        self.assertEqual('of the host', (self.outside / 'file').read_text())

    @ddt.data('/etc/new', 'etc/new', '/../etc/new', '/etc/./new',
              '/none/../etc/new')
    def test_new(self, path):
        self.addCleanup(os.umask, os.umask(0o077))
        self.write(path)
        self.assert_given('etc/new')

    def test_directories(self):
        self.addCleanup(os.umask, os.umask(0o077))
        self.write('/a/b/c/file')
        self.assert_given('a/b/c/file')
        for name in 'a', 'a/b', 'a/b/c':
            self.assertEqual(
                0o755, (self.root / name).stat().st_mode & 0o7777)

    def test_file_of_the_image_keeps_its_mode(self):
        self.write('/etc/motd')
        self.assert_given('etc/motd', 0o600)

    def test_the_last_one_wins(self):
        self.write('/etc/new', content=b'long before')
        self.write('/etc/new')
        self.assert_given('etc/new')

    def test_absolute_links_are_the_guests(self):
        (self.root / 'etc/link').symlink_to('/etc/motd')
        (self.root / 'here').symlink_to('/etc')
        self.write('/etc/link', '/here/new', '/here/a/new')
        self.assert_given('etc/motd', 0o600)
        self.assert_given('etc/new')
        self.assert_given('etc/a/new')
        self.assertTrue((self.root / 'etc/link').is_symlink())

    def test_link_to_a_file_that_is_not_there(self):
        (self.root / 'etc/link').symlink_to('../etc/new')
        self.write('/etc/link')
        self.assert_given('etc/new')

    def test_links_out_of_the_root(self):
        up = '../' * 40
        for number, target in enumerate((
                self.outside, f'{up}{self.outside}',
                f'/proc/self/root{self.outside}')):
            (self.root / f'directory{number}').symlink_to(target)
            (self.root / f'file{number}').symlink_to(f'{target}/file')
            for path in (f'/directory{number}/file', f'/file{number}',
                         f'/directory{number}/new/file'):
                # There is no such directory in the guest.
                self.refused(path)
            self.assert_outside_is_untouched()
        # And where there is one, that is it.
        inside = self.root / str(self.outside).lstrip('/')
        inside.mkdir(parents=True)
        self.write('/directory0/file', '/directory1/new/file')
        self.assertEqual('given', (inside / 'file').read_text())
        self.assertEqual('given', (inside / 'new/file').read_text())
        self.assert_outside_is_untouched()

    def test_path_that_climbs(self):
        self.write('/etc/../../../../../../new')
        self.assert_given('new')

    def test_what_is_no_file(self):
        os.mkfifo(self.root / 'pipe')
        (self.root / 'loop').symlink_to('loop')
        (self.root / 'nowhere').symlink_to('/none')
        for path in ('/pipe', '/etc', '/loop', '/loop/file', '/etc/motd/file',
                     '/' + 'x' * 300):
            self.refused(path)
        self.assertIn('leads nowhere', self.refused('/nowhere/file'))

    def test_pipe_that_somebody_reads(self):
        os.mkfifo(self.root / 'pipe')
        reader = os.open(self.root / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        self.assertIn('no regular file', self.refused('/pipe'))

    def test_parse(self):
        content = base64.b64encode(b'\0given').decode()
        self.assertEqual(
            (guest_files.File('/etc/new', b'\0given'),),
            guest_files.parse([{'path': '/etc/new', 'content': content}]))

    @ddt.data('/', '', '.', '..', '/etc/', '/etc/..', '/etc/.', '/a\0b')
    def test_no_path_of_a_file(self, path):
        error = self.assertRaises(
            errors.ContainerError, guest_files.parse,
            [{'path': path, 'content': ''}])
        self.assertEqual('file_refused', error.code)

    @ddt.data('files', {'path': '/a'}, ['/a'], [{'path': '/a'}],
              [{'path': 1, 'content': ''}], [{'path': '/a', 'content': '?'}],
              [{'path': '/a', 'content': None}],
              [{'path': '/\ud800', 'content': ''}])
    def test_no_list_of_files(self, value):
        error = self.assertRaises(
            errors.ContainerError, guest_files.parse, value)
        self.assertEqual('invalid', error.code)
