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


"""What the two sides of a copy tell each other; no root, no rsync."""

import os
import pathlib
import socket
import subprocess
import tempfile
import threading
import time

import testtools

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import sync
from nova_pycontainer.runtime.migration import sync_links
from nova_pycontainer.runtime.migration import sync_preamble


class TestPreamble(testtools.TestCase):

    def read(self, text, *, size=1 << 20, deadline=60.0):
        """Give ``text`` in pieces; return the preamble, and what is left."""
        ours, theirs = socket.socketpair()
        with ours:

            def feed():
                with theirs:
                    for i in range(0, len(text), size):
                        theirs.sendall(text[i:i + size])

            thread = threading.Thread(target=feed)
            thread.start()
            try:
                preamble = sync_preamble.Preamble.read(
                    ours, time.monotonic() + deadline, None)
                thread.join()
                rest = b''
                while chunk := ours.recv(1 << 16):
                    rest += chunk
                return preamble, rest
            finally:
                thread.join()

    def test_records(self):
        text = (b'd 2 0 5.5 5.5 \0'
                b'd 3 0 1.5 7.5 some dir\0'
                b'f 10 1 100 8.25 file with spaces\0'
                b'f 11 2 200 9.25 linked\0'
                b'f 11 2 200 0 again\0'
                b'l 12 3 5 0 end 0 all 1\nx\0'
                b'end 0 since 123.5\0')
        for size in (1, 2, 3, 7, 1000):
            preamble, rest = self.read(text + b'@RSYNCD: 32.0\n\0x', size=size)
            self.assertEqual(b'@RSYNCD: 32.0\n\0x', rest)
            self.assertEqual((False, True, 123.5), (
                preamble.everything, preamble.complete, preamble.time))
            self.assertEqual(
                {b'linked': b'11', b'again': b'11',
                 b'end 0 all 1\nx': b'12'}, preamble.links)
            self.assertEqual(
                {b'file with spaces': (100, 8.25, b'10 8.25'),
                 b'linked': (200, 9.25, b'11 9.25')}, preamble.changed)
            self.assertEqual(
                {b'': (b'2', 5.5, False), b'some dir': (b'3', 7.5, True)},
                preamble.directories)

    def test_ends(self):
        self.assertTrue(self.read(b'end 0 all 1.0\0')[0].everything)
        self.assertFalse(self.read(b'end 1 since 1.0\0')[0].complete)

    def test_broken(self):
        for text in (b'', b'f', b'f 1\0', b'f a b c d e\0', b'end\0',
                     b'end 0 all\0', b'end 0 all x\0', b'\0',
                     b'f 1 1 x 5 name\0', b'd 1 0 5 x name\0',
                     b'f 1 1 5 5.0 name\0'):
            error = self.assertRaises(errors.ContainerError, self.read, text)
            self.assertEqual('network', error.code, text)

    def test_too_long(self):
        before = sync_preamble._MAX_BYTES
        self.addCleanup(setattr, sync_preamble, '_MAX_BYTES', before)
        sync_preamble._MAX_BYTES = 1000
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b'f 1 1 5 5.0 name\0' * 100)
            error = self.assertRaises(
                errors.ContainerError, sync_preamble.Preamble.read, ours,
                time.monotonic() + 60, 60)
        self.assertEqual('network', error.code)

    def test_silence(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b'f 1 1 5 5.0 na')
            for deadline, idle in ((0.1, None), (60, 0.1), (-1, 5)):
                error = self.assertRaises(
                    errors.ContainerError, sync_preamble.Preamble.read, ours,
                    time.monotonic() + deadline, idle)
                self.assertEqual('timeout', error.code)

    def test_script(self):
        """What the shell writes is what is read."""
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        top = pathlib.Path(directory.name)
        (top / 'd').mkdir()
        (top / 'd/a\n').write_text('x')
        os.link(top / 'd/a\n', top / 'b')
        (top / 'old').write_text('y')
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                since = time.time() - 100
                done = subprocess.run(
                    ['sh', '-c', sync_preamble.SCRIPT, 'sh', '', 'since',
                     f'@{since}', '55.5', 'echo', 'the', 'rest'],
                    stdout=theirs.fileno(), stderr=subprocess.PIPE, cwd=top,
                    check=True, timeout=60)
            self.assertEqual(b'', done.stderr)
            preamble = sync_preamble.Preamble.read(
                ours, time.monotonic() + 60, None)
            self.assertEqual(b'the rest\n', ours.recv(100))
        self.assertEqual({b'', b'd'}, set(preamble.directories))
        self.assertEqual({b'd/a\n', b'b', b'old'}, set(preamble.changed))
        self.assertEqual({b'd/a\n', b'b'}, set(preamble.links))
        self.assertEqual(1, len(set(preamble.links.values())))

    def test_unseen(self):
        changed = sync_preamble.Changed
        directory = sync_preamble.Directory
        earlier = sync_preamble.Preamble(
            time=100.0,
            changed={b'same': changed(1, 50.0, b'a'),
                     b'other': changed(1, 50.0, b'b'),
                     b'late': changed(1, 99.5, b'c')},
            directories={b'd': directory(b'1', 50.0, False),
                         b'moved': directory(b'2', 50.0, False),
                         b'mode': directory(b'3', 50.0, False)})
        now = sync_preamble.Preamble(
            changed={b'same': changed(1, 50.0, b'a'),
                     b'other': changed(1, 50.0, b'B'),
                     b'late': changed(1, 99.5, b'c'),
                     b'new': changed(1, 150.0, b'd')},
            directories={b'd': directory(b'1', 150.0, False),
                         b'moved': directory(b'9', 50.0, False),
                         b'mode': directory(b'3', 150.0, True),
                         b'made': directory(b'4', 150.0, False)})
        files, directories = now.unseen(earlier)
        self.assertEqual([b'late', b'new', b'other'], sorted(files))
        self.assertEqual([b'made', b'mode', b'moved'], sorted(directories))


class TestSpoil(testtools.TestCase):
    """The destination changes files inside its directory, and no others."""

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.outside = pathlib.Path(directory.name)
        self.top = self.outside / 'top'
        (self.top / 'd').mkdir(parents=True)
        for path in (self.top / 'file', self.top / 'd/file',
                     self.outside / 'file'):
            path.write_text('0123456789')
            os.utime(path, (10**9, 10**9))
        (self.top / 'link').symlink_to('file')
        (self.top / 'out').symlink_to('..')
        os.mkfifo(self.top / 'fifo')
        self.root = os.open(self.top, os.O_PATH)
        self.addCleanup(os.close, self.root)

    def changed(self, size=100):
        return sync_preamble.Changed(size, 5.0, b'')

    def times(self, *names):
        return [(self.top / name).stat().st_mtime == 10**9 for name in names]

    def test_files(self):
        sync_preamble.spoil(self.root, {
            name: self.changed() for name in (
                b'file', b'link', b'fifo', b'd', b'out/file', b'../file',
                b'/etc/passwd', b'missing', b'file/x', b'')}, [])
        self.assertEqual([False, True, True], self.times(
            'file', 'd/file', '../file'))
        self.assertEqual(10, (self.top / 'file').stat().st_size)

    def test_size(self):
        sync_preamble.spoil(self.root, {b'd/file': self.changed(4)}, [])
        self.assertEqual('0123', (self.top / 'd/file').read_text())

    def test_directories(self):
        sync_preamble.spoil(
            self.root, {}, [b'', b'out', b'..', b'missing', b'file'])
        self.assertEqual([False, True, True], self.times(
            'file', 'd/file', '../file'))
        sync_preamble.spoil(self.root, {}, [b'd'])
        self.assertEqual([False], self.times('d/file'))

    def test_separate(self):
        for name in ('a', 'b', 'd/c', 'e'):
            os.link(self.top / 'file', self.top / name)
        with sync_links.Finder(self.top) as finder:
            groups = list(finder.groups(time.monotonic() + 60))
        self.assertEqual([(b'a', b'b', b'd/c', b'e', b'file')], groups)
        sync_links.separate(self.root, groups, {
            b'a': b'5', b'b': b'6', b'd/c': b'5', b'file': b'5'})
        self.assertEqual(
            ['a', 'd', 'fifo', 'file', 'link', 'out'],
            sorted(os.listdir(self.top)))
        self.assertEqual(3, (self.top / 'd/c').stat().st_nlink)


class TestMark(testtools.TestCase):

    def test_earliest(self):
        mark = sync.Mark.now()
        self.assertLess(mark.earliest(), mark.realtime)
        self.assertGreater(mark.earliest(), mark.realtime - 5)

    def test_clock_set_back(self):
        now = sync.Mark.now()
        mark = sync.Mark(now.realtime + 3600, now.monotonic)
        self.assertLess(mark.earliest(), now.realtime)

    def test_clock_set_forward(self):
        now = sync.Mark.now()
        mark = sync.Mark(now.realtime - 3600, now.monotonic)
        self.assertLess(mark.earliest(), mark.realtime)
