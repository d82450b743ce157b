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


"""Copies that fail, and copies from a guest or to a peer that is hostile."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import fixtures

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import sync
from nova_pycontainer.runtime.migration import sync_preamble
from nova_pycontainer.runtime.migration import sync_rsync
from tests.runtime import sync_base
from tests.runtime.sync_base import MIB


class TestFailures(sync_base.Case):

    idle_timeout = 30.0

    def half_way(self, limit=2 * MIB, *, final=True):
        return super().half_way(limit, final=final)

    def fill(self):
        (self.a.upper / 'directory').mkdir(exist_ok=True)
        for i in range(8):
            (self.a.upper / 'directory' / f'file-{i}').write_bytes(
                os.urandom(MIB))

    def assert_next_pass_is_right(self):
        self.one(final=True)
        self.assert_same()

    def assert_fails(self, code, result):
        self.assertIsInstance(result, errors.ContainerError)
        self.assertEqual(code, result.code, str(result))
        self.assertIsNotNone(result.remedy)

    def kill(self, option):
        """Kill the process that was started with an option."""
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = pathlib.Path(
                    f'/proc/{pid}/cmdline').read_text().split('\0')
                if words[0] == 'rsync' and option in words and (
                        os.getpgid(pid) == pid):
                    os.kill(pid, signal.SIGKILL)

    def check(self, code, interrupt):
        """Interrupt a final pass, which fails, and another one, which is
        incomplete.
        """
        self.fill()
        with self.half_way() as state:
            interrupt(*state[:3])
            state[1].go.set()
            self.assert_fails(code, state[3]())
        if code == 'network':
            self.fill()
            with self.half_way(final=False) as state:
                interrupt(*state[:3])
                state[1].go.set()
                self.assertFalse(state[3]().complete)
        self.assert_next_pass_is_right()

    def test_killed_source(self):
        self.check('network', lambda server, valve, ours: self.kill(
            '--daemon'))

    def test_closed_server(self):
        self.check('network', lambda server, valve, ours: server.close())

    def test_lost_connection(self):
        self.check('network', lambda server, valve, ours: valve.close())

    def test_stopped_by_the_destination(self):
        self.check('network', lambda server, valve, ours: ours.shutdown(
            socket.SHUT_RDWR))

    def test_killed_client(self):
        self.check('internal', lambda server, valve, ours: self.kill(
            '-aHAXS'))

    def test_silent_connection(self):
        self.fill()
        self.idle_timeout = 1.0
        with self.half_way() as (_, _, _, end):
            self.assert_fails('timeout', end())
        self.idle_timeout = 30.0
        self.assert_next_pass_is_right()

    def test_silent_source(self):
        """Before it says anything."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for kw in ({'final': True, 'idle_timeout': 0.2},
                       {'timeout': 0.2}):
                self.assert_fails('timeout', self.assertRaises(
                    errors.ContainerError, self.copy.fetch, ours, **kw))

    def test_too_slow(self):
        self.fill()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = sync.serve(self.a.upper, theirs)
            self.addCleanup(server.close)
            inner, end = socket.socketpair()
            valve = sync_base.Valve(ours, inner, MIB)
            self.addCleanup(valve.close)
            with end:
                self.assert_fails('timeout', self.assertRaises(
                    errors.ContainerError, self.copy.fetch, end,
                    timeout=3.0))

    def test_garbage(self):
        for text in (b'', b'HTTP/1.1 400 Bad Request\r\n\r\n',
                     b'f 1 2\0', b'f x y z a b\0', b'end 0\0', b'\0\0\0',
                     b'x' * 200_000, b'end 0 all x\0',
                     b'end 0 all 1\0@RSYNCD: 99.0\n@ERROR: no\n',
                     b'end 0 all 1\0' + os.urandom(1000)):
            ours, theirs = socket.socketpair()
            with ours:
                feeder = threading.Thread(
                    target=self.feed, args=(theirs, text))
                feeder.start()
                error = self.assertRaises(
                    errors.ContainerError, self.copy.fetch, ours,
                    timeout=sync_base.PATIENCE)
                self.assertIn(error.code, ('network', 'internal'), text)
                feeder.join(sync_base.PATIENCE)

    @staticmethod
    def feed(sock, text):
        with sock, contextlib.suppress(OSError):
            sock.sendall(text)

    def test_source_without_directory(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.assertRaises(
                FileNotFoundError, sync.serve, self.base / 'none', theirs)

    def test_without_rsync(self):
        """The operator is told what is missing."""
        tools = self.base / 'tools'
        tools.mkdir()
        for name in ('sh', 'find', 'sync', 'nice', 'cat'):
            (tools / name).symlink_to(f'/usr/bin/{name}')
        before = os.environ['PATH']
        self.fill()
        sync_rsync.version.cache_clear()
        os.environ['PATH'] = f'{tools}:/{self.marker}'
        try:
            error = self.assertRaises(errors.ContainerError, self.one)
        finally:
            os.environ['PATH'] = before
        self.assertIn('rsync', str(error))
        self.assertEqual('unsupported', error.code)

    def test_old_rsync(self):
        """Versions that spoil files in place do not work in place."""
        (self.a.upper / 'file').write_bytes(os.urandom(100_000))
        self.one()
        inode = (self.b.upper / 'file').stat().st_ino
        for version, same in (((3, 3), True), ((3, 2), False)):
            with fixtures.MonkeyPatch(
                    'nova_pycontainer.runtime.migration.sync_rsync.version',
                    lambda found=version: found):
                with open(self.a.upper / 'file', 'r+b') as f:
                    f.write(os.urandom(10))
                self.one()
            self.assert_same()
            self.assertEqual(
                same, inode == (self.b.upper / 'file').stat().st_ino)


class TestFullDisk(sync_base.Case):

    method = 'loop'

    def test_too_small(self):
        """What does not fit is said, and what then fits arrives."""
        filler = self.b.upper.parent / 'filler'
        filler.write_bytes(os.urandom(20 * MIB))
        (self.a.upper / 'large').write_bytes(os.urandom(16 * MIB))
        for final in (False, True):
            error = self.assertRaises(
                errors.ContainerError, self.one, final=final)
            self.assertEqual('no_space', error.code, str(error))
            self.assertIn('No space left', error.cause)
        filler.unlink()
        self.one(final=True)
        self.assert_same()

    def test_no_inodes(self):
        try:
            for i in range(100_000):
                (self.b.upper.parent / f'filler-{i}').touch()
        except OSError:
            pass
        (self.a.upper / 'directory').mkdir()
        error = self.assertRaises(errors.ContainerError, self.one)
        self.assertEqual('no_space', error.code, str(error))

    def test_what_goes_makes_room_first(self):
        """A disk that is never more than full on the source."""
        size = 17 * MIB
        (self.a.upper / 'zzz').write_bytes(os.urandom(size))
        self.one()
        (self.a.upper / 'zzz').unlink()
        (self.a.upper / 'aaa').write_bytes(os.urandom(size))
        self.one()
        self.assert_same()
        # and by what shrinks in favour of what grows
        (self.a.upper / 'bbb').write_bytes(b'small')
        self.one()
        os.truncate(self.a.upper / 'aaa', 5)
        os.rename(self.a.upper / 'aaa', self.a.upper / 'tmp')
        (self.a.upper / 'aaa').write_bytes(os.urandom(size))
        (self.a.upper / 'tmp').unlink()
        with open(self.a.upper / 'bbb', 'r+b') as f:
            f.write(os.urandom(MIB))
        self.one(final=True)
        self.assert_same()

    def test_two_files_change_sizes(self):
        size = 17 * MIB
        (self.a.upper / 'aaa').write_bytes(b'small')
        (self.a.upper / 'zzz').write_bytes(os.urandom(size))
        self.one()
        os.truncate(self.a.upper / 'zzz', 3)
        (self.a.upper / 'aaa').write_bytes(os.urandom(size))
        self.one(final=True)
        self.assert_same()


class TestHostileGuest(sync_base.Case):

    #: Exchanges two names, again and again; renameat2(2) is atomic.
    _EXCHANGE = '''
import ctypes, sys
libc = ctypes.CDLL(None)
a, b = (name.encode() for name in sys.argv[1:3])
while True:
    libc.renameat2(-100, a, -100, b, 2)
'''

    def attacker(self, code, *args):
        process = subprocess.Popen(
            [sys.executable, '-c', code, *map(str, args)],
            stdin=subprocess.DEVNULL)

        def stop():
            process.kill()
            process.wait()

        self.addCleanup(stop)
        return stop

    def test_links_to_the_host(self):
        """CVE-2015-7548, CVE-2016-2140: a directory is replaced by a link to
        one of the host, and back, at any moment of many passes.
        """
        secret = self.base / 'secret'
        (secret / 'below').mkdir(parents=True)
        for i in range(40):
            (secret / f'file-{i}').write_text('HOST SECRET')
            (secret / 'below' / f'file-{i}').write_text('HOST SECRET')
            (secret / f'only-here-{i}').write_text('HOST SECRET')
        inside = self.a.upper / 'directory'
        (inside / 'below').mkdir(parents=True)
        for i in range(40):
            (inside / f'file-{i}').write_text('of the guest')
            (inside / 'below' / f'file-{i}').write_text('of the guest')
        (self.a.upper / 'link').symlink_to(secret)
        (self.a.upper / 'file').write_text('of the guest')
        (self.a.upper / 'file-link').symlink_to(secret / 'file-0')
        stop = [
            self.attacker(self._EXCHANGE, inside, self.a.upper / 'link'),
            self.attacker(self._EXCHANGE, self.a.upper / 'file',
                          self.a.upper / 'file-link')]
        for i in range(25):
            self.mark = None if i % 5 == 0 else self.mark
            self.one()
            for path in self.b.upper.rglob('*'):
                self.assertNotIn('only-here', path.name)
                if path.is_file() and not path.is_symlink() and (
                        self.b.upper in path.resolve().parents):
                    self.assertEqual('of the guest', path.read_text(), path)
        for each in stop:
            each()
        self.one(final=True)
        self.assert_same()

    def test_files_come_and_go(self):
        stop = self.attacker('''
import os, random, shutil, sys
os.chdir(sys.argv[1])
r = random.Random(1)
while True:
    name = f'd{r.randrange(8)}'
    try:
        kind = r.randrange(6)
        if kind == 0:
            os.makedirs(name, exist_ok=True)
        elif kind == 1:
            os.rename(name, f'd{r.randrange(8)}/x')
        elif kind == 2 and r.randrange(4) == 0:
            shutil.rmtree(name)
        elif kind == 3:
            os.link(f'{name}/f1', f'd{r.randrange(8)}/l')
        else:
            with open(f'{name}/f{r.randrange(50)}', 'wb') as f:
                f.write(os.urandom(r.randrange(200_000)))
    except OSError:
        pass
''', self.a.upper)
        for _ in range(12):
            self.one()
        stop()
        self.assertTrue(self.one(final=True).complete)
        self.assert_same()

    def test_change_under_a_final_pass(self):
        """It is an error then: the copy is not the source."""
        for i in range(30):
            (self.a.upper / f'file-{i:02d}').write_bytes(os.urandom(MIB))
        with self.half_way(2 * MIB, final=True) as (_, valve, _, end):
            for i in range(20, 30):
                (self.a.upper / f'file-{i}').unlink()
            valve.go.set()
            result = end()
        self.assertIsInstance(result, errors.ContainerError)
        self.assertIn('vanished', str(result))

    def test_change_under_another_pass(self):
        """Files with several names, too, with which rsync has a problem."""
        for i in range(30):
            path = self.a.upper / f'file-{i:02d}'
            path.write_bytes(os.urandom(MIB))
            os.link(path, self.a.upper / f'link-{i:02d}')
        with self.half_way(2 * MIB) as (_, valve, _, end):
            for i in range(20, 30):
                (self.a.upper / f'file-{i}').unlink()
                (self.a.upper / f'link-{i}').unlink()
            valve.go.set()
            self.assertFalse(end().complete)
        self.one(final=True)
        self.assert_same()


class TestHostilePeer(sync_base.Case):
    """Whoever holds the other end of the socket gets that one directory."""

    def setUp(self):
        super().setUp()
        (self.a.upper / 'file').write_text('of the guest')
        (self.a.upper / 'out').symlink_to('/')
        (self.a.upper / 'passwd').symlink_to('/etc/passwd')

    def rsync(self, *args):
        """Run rsync against the served directory, with these arguments."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                server = sync.serve(self.a.upper, theirs)
            try:
                sync_preamble.Preamble.read(
                    ours, time.monotonic() + sync_base.PATIENCE, None)
                return subprocess.run(
                    ['sh', '-c', 'exec "$@" 7<&0 </dev/null', 'sh', 'rsync',
                     '--blocking-io', '-e', sync._CONNECT, *args],
                    stdin=ours, capture_output=True, text=True,
                    timeout=sync_base.PATIENCE)
            finally:
                server.close()

    def test_list(self):
        done = self.rsync('source::')
        self.assertEqual('', done.stdout)

    def test_other_modules(self):
        for name in ('etc', 'global', '', '..'):
            self.rsync('-a', f'source::{name}/', f'{self.b.upper}/')
            self.assertEqual([], os.listdir(self.b.upper), name)

    def test_outside(self):
        for path in ('..', '../', '../../../etc/passwd', '/etc/passwd',
                     'out/etc/passwd', 'out/', 'etc'):
            self.rsync('-a', f'source::files/{path}', f'{self.b.upper}/')
            for found in self.b.upper.rglob('*'):
                self.assertIn(found.name, ('file', 'out', 'passwd', 'x'))
                self.assertTrue(
                    found.is_symlink() or found.name == 'file', found)

    def test_links_followed(self):
        for option in ('-L', '--copy-unsafe-links', '--copy-dirlinks'):
            self.rsync('-a', option, 'source::files/', f'{self.b.upper}/')
            for found in self.b.upper.rglob('*'):
                if not found.is_symlink() and found.is_file():
                    self.assertEqual('of the guest', found.read_text())

    def test_write(self):
        evil = self.base / 'evil'
        evil.write_text('x')
        done = self.rsync(str(evil), 'source::files/')
        self.assertNotEqual(0, done.returncode)
        done = self.rsync('-a', '--remove-source-files',
                          'source::files/file', f'{self.b.upper}/')
        self.assertEqual(['file', 'out', 'passwd'],
                         sorted(os.listdir(self.a.upper)))

    def test_options(self):
        """Only what a pass needs can be asked for."""
        for option in ('--copy-devices', '--write-devices', '--copy-links',
                       '--files-from=/etc/passwd', '--checksum',
                       '--remove-source-files', '--log-file=/x'):
            with fixtures.FakeLogger() as log:
                done = self.rsync('-a', '-M', option, 'source::files/',
                                  f'{self.b.upper}/')
            self.assertNotEqual(0, done.returncode, option)
            self.assertIn('refuse', done.stderr + log.output, option)
            self.assertEqual([], os.listdir(self.b.upper), option)
