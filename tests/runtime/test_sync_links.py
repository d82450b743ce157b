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


"""Hard links of the layer, one of whose names a guest has written to."""

import os
import shutil
import subprocess

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import sync_links
from tests.runtime import sync_base
from tests.runtime.sync_base import BASE


class Case(sync_base.Case):

    def setUp(self):
        super().setUp()
        for i in range(4):
            for directory in (f'd{i}/a', f'd{i}/b', f'd{i}/deep/er'):
                (self.layer / directory).mkdir(parents=True)
            first = self.layer / f'd{i}/a/one'
            first.write_text(f'of the layer {i}')
            os.chown(first, 5, 6)
            os.utime(first, (10**9, 10**9))
            os.link(first, self.layer / f'd{i}/b/two')
            os.link(first, self.layer / f'd{i}/deep/er/three')
        # what a parent made by the kernel must have, too
        parent = self.layer / 'd0/deep/er'
        os.chown(parent, 7, 8)
        parent.chmod(0o2751)
        os.setxattr(parent, 'user.note', b'of the parent')
        os.utime(parent, (10**9, 10**9))
        (self.layer / 'link').symlink_to('somewhere')
        os.link(self.layer / 'link', self.layer / 'd0/link',
                follow_symlinks=False)
        os.mkfifo(self.layer / 'fifo')
        os.link(self.layer / 'fifo', self.layer / 'd0/fifo')
        self.a.mount()
        self.r = self.a.root

    def check(self):
        """It arrives; also at the next move, and back again."""
        before = sync_base.tree(self.r, view=True)
        self.move()
        self.assert_trees(before, sync_base.tree(self.r, view=True))
        self.assert_same()
        self.assert_same_view()
        for _ in range(2):
            self.swap()
            self.a.mount()
            self.r = self.a.root
            self.move()
            self.assert_same()
            self.assert_same_view()
            self.assert_trees(before, sync_base.tree(self.r, view=True))


class TestAliases(Case):

    def test_written(self):
        (self.r / 'd0/a/one').write_text('new')
        self.assertEqual('new', (self.r / 'd0/b/two').read_text())
        self.check()

    def test_written_through_another_name(self):
        with open(self.r / 'd0/deep/er/three', 'a') as f:
            f.write(' and more')
        self.check()

    def test_the_changed_name_is_gone(self):
        """What is in the index only would be lost."""
        (self.r / 'd0/a/one').write_text('new')
        (self.r / 'd0/a/one').unlink()
        shutil.rmtree(self.r / 'd0/a')
        self.check()
        self.assertEqual('new', (self.b.upper / 'd0/b/two').read_text())

    def test_only_its_mode(self):
        (self.r / 'd0/b/two').chmod(0o4711)
        os.chown(self.r / 'd1/b/two', BASE + 77, BASE + 78)
        os.setxattr(self.r / 'd2/b/two', 'user.x', b'y')
        self.check()

    def test_another_name_is_gone(self):
        (self.r / 'd0/a/one').write_text('new')
        (self.r / 'd0/b/two').unlink()
        shutil.rmtree(self.r / 'd0/deep')
        self.check()

    def test_all_names_are_gone(self):
        (self.r / 'd0/a/one').write_text('new')
        for name in ('a/one', 'b/two', 'deep/er/three'):
            (self.r / 'd0' / name).unlink()
        self.check()

    def test_another_name_is_another_file(self):
        (self.r / 'd0/a/one').write_text('new')
        (self.r / 'd0/b/two').unlink()
        (self.r / 'd0/b/two').write_text('by itself')
        (self.r / 'd0/deep/er/three').unlink()
        (self.r / 'd0/deep/er/three').mkdir()
        self.check()

    def test_another_name_is_a_link(self):
        (self.r / 'd0/a/one').write_text('new')
        (self.r / 'd0/b/two').unlink()
        (self.r / 'd0/b/two').symlink_to('/etc/passwd')
        shutil.rmtree(self.r / 'd0/deep/er')
        (self.r / 'd0/deep/er').symlink_to('../../d1/a')
        self.check()

    def test_renamed(self):
        (self.r / 'd0/a/one').write_text('new')
        os.rename(self.r / 'd0/a/one', self.r / 'elsewhere')
        os.rename(self.r / 'd1/b/two', self.r / 'd1/b/renamed')
        with open(self.r / 'd1/b/renamed', 'a') as f:
            f.write('more')
        self.check()

    def test_linked_once_more(self):
        os.link(self.r / 'd0/b/two', self.r / 'four')
        os.link(self.r / 'd1/b/two', self.r / 'five')
        (self.r / 'five').write_text('new')
        (self.r / 'd2/a/one').write_text('new')
        os.link(self.r / 'd2/b/two', self.r / 'd2/six')
        self.check()

    def test_directory_moved(self):
        """By copying, as mv(1) does where the kernel refuses."""
        (self.r / 'd0/a/one').write_text('new')
        shutil.move(self.r / 'd0/deep', self.r / 'moved')
        self.check()

    def test_directory_replaced(self):
        (self.r / 'd0/a/one').write_text('new')
        shutil.rmtree(self.r / 'd0/deep')
        (self.r / 'd0/deep/er').mkdir(parents=True)
        (self.r / 'd0/deep/er/other').write_text('x')
        self.check()

    def test_other_types(self):
        os.chown(self.r / 'link', BASE + 1, BASE + 2, follow_symlinks=False)
        (self.r / 'fifo').chmod(0o611)
        self.check()

    def test_untouched_files_stay_in_the_layer(self):
        (self.r / 'd0/a/one').write_text('new')
        self.move()
        for name in ('d1', 'link', 'fifo', 'd0/link'):
            self.assertFalse(os.path.lexists(self.b.upper / name), name)

    def test_nothing_was_changed(self):
        self.assertEqual([], self.link_aliases())
        self.assertEqual([], os.listdir(self.a.upper))

    def test_once_is_enough(self):
        (self.r / 'd0/a/one').write_text('new')
        at = (self.r / 'd0/a/one').stat().st_mtime_ns
        self.assertEqual(['d0/b/two', 'd0/deep/er/three'],
                         self.link_aliases())
        self.assertEqual([], self.link_aliases())
        self.assertEqual(at, (self.r / 'd0/b/two').stat().st_mtime_ns)
        info = os.stat(self.a.upper / 'd0/deep/er')
        self.assertEqual(
            (BASE + 7, BASE + 8, 0o42751, 10**9),
            (info.st_uid, info.st_gid, info.st_mode, info.st_mtime))
        self.assertEqual(b'of the parent', os.getxattr(
            self.a.upper / 'd0/deep/er', 'user.note'))

    def test_a_program_that_runs(self):
        """It cannot be opened for writing."""
        tool = self.layer / 'tool'
        shutil.copy2(shutil.which('sleep'), tool)
        os.link(tool, self.layer / 'd0/tool')
        self.a.unmount()
        sync_links._cache.clear()
        self.a.mount()
        (self.r / 'tool').chmod(0o755)
        with open(self.r / 'tool', 'ab'):
            pass
        running = subprocess.Popen([self.r / 'd0/tool', '600'])
        try:
            self.assertRaises(OSError, open, self.r / 'd0/tool', 'r+b')
            before = sync_base.tree(self.r, view=True)
            self.move()
            self.assert_trees(before, sync_base.tree(self.r, view=True))
            self.assert_same_view()
        finally:
            running.kill()
            running.wait()

    def test_changed_between_passes(self):
        (self.r / 'd0/a/one').write_text('first')
        self.link_aliases()
        self.one()
        (self.r / 'd0/b/two').write_text('again')
        (self.r / 'd1/b/two').write_text('one more')
        (self.r / 'd0/deep/er/three').unlink()
        self.link_aliases()
        self.one(final=True)
        self.assert_same()
        self.assert_same_view()

    def test_full_disk(self):
        """The guest has left no room for a name."""
        self.a.unmount()
        subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=1M,nr_inodes=40',
             self.marker, self.a.upper.parent], check=True)
        self.addCleanup(
            subprocess.run, ['umount', self.a.upper.parent], check=True)
        self.addCleanup(self.a.unmount)
        self.a.upper.mkdir()
        self.a.work.mkdir()
        self.a.mount()
        (self.r / 'd0/a/one').write_text('new')
        try:
            for i in range(100):
                (self.r / f'filler-{i}').write_text('')
        except OSError:
            pass
        error = self.assertRaises(
            errors.ContainerError, self.link_aliases)
        self.assertEqual('no_space', error.code)


class TestAliasesOfAnotherFileSystem(Case):
    """The upper has one of its own, so inode numbers may be the same."""

    method = 'loop'

    def test_written(self):
        (self.r / 'd0/a/one').write_text('new')
        self.assertEqual('new', (self.r / 'd0/b/two').read_text())
        self.check()

    def test_written_through_another_name(self):
        with open(self.r / 'd0/deep/er/three', 'a') as f:
            f.write(' and more')
        self.check()

    def test_the_changed_name_is_gone(self):
        """What is in the index only would be lost."""
        (self.r / 'd0/a/one').write_text('new')
        (self.r / 'd0/a/one').unlink()
        shutil.rmtree(self.r / 'd0/a')
        self.check()
        self.assertEqual('new', (self.b.upper / 'd0/b/two').read_text())
