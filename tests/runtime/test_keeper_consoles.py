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

"""Consoles that the keeper holds: real terminals."""

import fcntl
import os
import pty
import socket
import stat
import struct
import termios
import threading
import time
import tty
import uuid as uuidlib

from nova_pycontainer.runtime import keeper
from tests.runtime import keeper_base as base


class TestConsoles(base.KeeperTestCase):

    def setUp(self):
        super().setUp()
        self.log_path = f'{self.dir}/console.log'

    def hold(self, max_bytes=65536):
        """A terminal whose master is the keeper's; returns the guest's end.
        """
        master, slave = pty.openpty()
        tty.setraw(slave)
        self.client.hold(self.uuid, master, self.log_path, max_bytes)
        os.close(master)
        return slave

    def attach(self, mode='rw'):
        ours, theirs = socket.socketpair()
        self.client.attach(self.uuid, theirs.fileno(), mode)
        theirs.close()
        self.addCleanup(ours.close)
        ours.settimeout(base.PATIENCE)
        return ours

    def logged(self):
        data = b''
        for path in (f'{self.log_path}.1', self.log_path):
            try:
                with open(path, 'rb') as f:
                    data += f.read()
            except FileNotFoundError:
                pass
        return data

    def wait_logged(self, data):
        base.wait_for(lambda: data in self.logged(), f'{data!r} in the log')

    def receive(self, sock, count):
        data = b''
        while len(data) < count:
            more = sock.recv(count - len(data))
            self.assertTrue(more, f'the end after {data!r}')
            data += more
        return data

    def test_output_is_logged_without_anybody_looking(self):
        slave = self.hold()
        os.write(slave, b'hello')
        self.wait_logged(b'hello')
        mode = os.stat(self.log_path).st_mode
        self.assertEqual(0o600, stat.S_IMODE(mode))
        os.close(slave)

    def test_a_guest_that_prints_without_end_never_blocks(self):
        slave = self.hold(max_bytes=8192)
        # More than any buffer on the way: it blocks unless it is drained.
        for number in range(4000):
            os.write(slave, b'%07d ' % number * 32)
        os.write(slave, b'the end')
        self.wait_logged(b'the end')
        sizes = [os.path.getsize(p) for p in
                 (self.log_path, f'{self.log_path}.1')]
        self.assertLessEqual(sum(sizes), 8192)
        self.assertGreaterEqual(sum(sizes), 4096)
        # The end of it all, without a gap.
        self.assertIn(b'0003999 ' * 32 + b'the end', self.logged())
        os.close(slave)

    def test_the_ring_is_within_its_limit_at_any_moment(self):
        slave = self.hold(max_bytes=4096)
        done = threading.Event()
        largest = []

        def measure():
            while not done.is_set():
                total = 0
                for path in (self.log_path, f'{self.log_path}.1'):
                    try:
                        total += os.path.getsize(path)
                    except FileNotFoundError:
                        pass
                largest.append(total)

        thread = threading.Thread(target=measure)
        thread.start()
        for _ in range(2000):
            os.write(slave, b'x' * 99 + b'\n')
        os.write(slave, b'the end')
        self.wait_logged(b'the end')
        done.set()
        thread.join(base.PATIENCE)
        # A rotation between the two looks may count one file twice.
        self.assertLessEqual(max(largest), 4096)
        os.close(slave)

    def test_a_log_that_is_there_is_continued(self):
        with open(self.log_path, 'w') as f:
            f.write('before\n')
        slave = self.hold()
        os.write(slave, b'after')
        self.wait_logged(b'before\nafter')
        os.close(slave)

    def test_a_log_that_is_a_symbolic_link_is_refused(self):
        os.symlink(f'{self.dir}/elsewhere', self.log_path)
        self.assertError('internal', self.hold)
        self.assertFalse(os.path.exists(f'{self.dir}/elsewhere'))
        self.assertEqual([], self.client.list())

    def test_the_guest_may_close_and_reopen_its_console(self):
        slave = self.hold()
        name = os.ttyname(slave)
        os.write(slave, b'first')
        for word in (b'second', b'third'):
            os.close(slave)
            base.wait_for(lambda: self.client.list()[0]['console']['idle'],
                          'the keeper to see that nobody has it open')
            slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(slave)
            os.write(slave, word)
            self.wait_logged(word)
        viewer = self.attach()
        viewer.sendall(b'typed')
        self.assertEqual(b'typed', os.read(slave, 100))
        os.close(slave)

    def test_an_idle_console_costs_no_time(self):
        slave = self.hold()
        os.close(slave)
        base.wait_for(lambda: self.client.list()[0]['console']['idle'], 'EIO')
        pid = self.client.ping()['pid']

        def ticks():
            with open(f'/proc/{pid}/stat') as f:
                fields = f.read().rpartition(')')[2].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        time.sleep(2)
        # A busy loop would have used most of 200 ticks.
        self.assertLess(ticks() - before, 50)

    def test_two_viewers_read_and_the_latest_writes(self):
        slave = self.hold()
        first, second = self.attach(), self.attach()
        watcher = self.attach('ro')
        os.write(slave, b'login: ')
        for viewer in (first, second, watcher):
            self.assertEqual(b'login: ', self.receive(viewer, 7))
        watcher.sendall(b'no')
        first.sendall(b'neither')
        second.sendall(b'root')
        self.assertEqual(b'root', os.read(slave, 100))
        second.close()
        base.wait_for(lambda: self.client.list()[0]['console']['viewers'] == 2,
                      'the viewer to leave')
        first.sendall(b'mine')
        # What was typed by those who may not was thrown away, not kept.
        self.assertEqual(b'mine', os.read(slave, 100))
        os.close(slave)

    def test_a_slow_viewer_delays_neither_the_guest_nor_others(self):
        slave = self.hold(max_bytes=4096)
        slow, quick = self.attach(), self.attach()
        seen = bytearray()

        def look():
            while not seen.endswith(b'the end'):
                seen.extend(quick.recv(65536))

        thread = threading.Thread(target=look)
        thread.start()
        line = b'y' * 127 + b'\n'
        for _ in range(16384):
            os.write(slave, line)
        os.write(slave, b'the end')
        self.wait_logged(b'the end')
        thread.join(base.PATIENCE)
        self.assertFalse(thread.is_alive())
        self.assertTrue(seen.endswith(line + b'the end'))
        self.assertGreater(self.client.list()[0]['console']['dropped'], 0)
        # The slow one gets the end, and is still there.
        late = b''
        while not late.endswith(b'the end'):
            late += slow.recv(65536)
        self.assertLess(len(late), 2097152)
        slow.sendall(b'ignored')
        os.close(slave)

    def test_a_guest_that_does_not_read_stops_its_writer_only(self):
        slave = self.hold()
        viewer = self.attach()
        viewer.settimeout(1)
        with self.assertRaises(TimeoutError):
            while True:
                viewer.sendall(b'z' * 4096)
        self.client.ping()
        os.write(slave, b'alive')
        self.wait_logged(b'alive')
        os.close(slave)

    def test_a_new_master_keeps_log_and_viewers(self):
        slave = self.hold()
        viewer = self.attach()
        os.write(slave, b'last words')
        new = self.hold()
        os.close(slave)
        os.write(new, b' first words')
        self.wait_logged(b'last words first words')
        self.assertEqual(
            b'last words first words', self.receive(viewer, 22))
        viewer.sendall(b'hello')
        self.assertEqual(b'hello', os.read(new, 100))
        os.close(new)

    def test_the_window_has_the_size_that_is_set(self):
        slave = self.hold()
        self.client.resize(self.uuid, 50, 132)
        size = fcntl.ioctl(slave, termios.TIOCGWINSZ, b'\0' * 8)
        self.assertEqual((50, 132), struct.unpack('HHHH', size)[:2])
        os.close(slave)

    def test_release_keeps_the_last_words_and_closes_the_viewers(self):
        slave = self.hold()
        viewer = self.attach()
        os.write(slave, b'halted')
        self.assertTrue(self.client.release(self.uuid))
        self.assertEqual(b'halted', self.logged())
        self.assertEqual(b'halted', self.receive(viewer, 6))
        self.assertEqual(b'', viewer.recv(1))
        self.assertFalse(self.client.release(self.uuid))
        self.assertError('not_found', self.client.resize, self.uuid, 1, 1)
        self.assertError('not_found', self.attach)
        # The master is really gone: the guest is hung up.
        self.assertEqual(b'', os.read(slave, 1))
        os.close(slave)

    def test_more_than_a_page_of_consoles_is_listed(self):
        expected = set()
        slaves = []
        for _ in range(keeper.PAGE + 5):
            self.uuid = str(uuidlib.uuid4())
            self.log_path = f'{self.dir}/{self.uuid}.log'
            slaves.append(self.hold())
            expected.add(self.uuid)
        entries = self.client.list()
        self.assertEqual(len(expected), len(entries))
        self.assertEqual(expected, {e['uuid'] for e in entries})
        for slave in slaves:
            os.close(slave)

    def test_what_is_no_terminal_or_no_socket_is_refused(self):
        with open('/dev/null') as f:
            self.assertError('invalid', self.client.hold, self.uuid,
                             f.fileno(), self.log_path, 65536)
            slave = self.hold()
            self.assertError(
                'invalid', self.client.attach, self.uuid, f.fileno())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            self.assertError('invalid', self.client.attach, self.uuid,
                             sock.fileno())
        os.close(slave)
