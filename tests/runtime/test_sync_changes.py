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

"""Copies of an upper: what changes between passes."""

import mmap
import os
import shutil
import time

from nova_pycontainer.runtime.migration import sync
from tests.runtime import sync_base
from tests.runtime.sync_base import MIB


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
        self.one(copy=sync.Copy(self.b.upper))
        self.assert_same()

    def test_the_clock_was_set_back(self):
        self.write('a', 'contents')
        self.one()
        # as if it had been an hour later then
        self.mark = sync.Mark(
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
