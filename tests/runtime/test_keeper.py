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

"""The keeper as a real process, with real children and real terminals."""

import fcntl
import glob
import json
import os
import pty
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
import unittest
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper
from nova_pycontainer.runtime import keeper_children
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import keeper_process

#: Nothing here takes long; this only ends a test that hangs.
PATIENCE = 60.0


def wait_for(condition, what):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f'waited {PATIENCE:g} s in vain for {what}')


def descriptors(pid, sockets):
    """What a process has open, without the numbers, once it is quiet.

    A connection that was just closed here may still be open there.

    :param sockets: how many of them are right
    """
    return wait_for(
        lambda: (lambda found: found if sum(
            name.startswith('socket:') for name in found) == sockets
            else None)(_descriptors(pid)),
        f'{sockets} sockets in {_descriptors(pid)}')


def _descriptors(pid):
    found = []
    for number in os.listdir(f'/proc/{pid}/fd'):
        try:
            found.append(os.readlink(f'/proc/{pid}/fd/{number}'))
        except FileNotFoundError:
            pass
    return sorted(found)


class KeeperTestCase(unittest.TestCase):

    def setUp(self):
        super().setUp()
        if os.geteuid():
            self.skipTest('the keeper is a root process: run as root')
        directory = tempfile.TemporaryDirectory(prefix='pyc-keeper-')
        self.addCleanup(directory.cleanup)
        self.dir = directory.name
        self.socket = f'{self.dir}/keeper.sock'
        self.start()
        self.client = keeper_client.KeeperClient(self.socket)
        self.uuid = str(uuidlib.uuid4())

    def start(self, **kwargs):
        argv, env = keeper_client.command(self.socket)
        env |= kwargs.pop('env', {})
        self.log = open(f'{self.dir}/log', 'ab')
        self.addCleanup(self.log.close)
        # As a child of ours, so that its end can be awaited.
        self.process = subprocess.Popen(
            [*kwargs.pop('prefix', []), *argv], env=env,
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            start_new_session=True, **kwargs)
        self.addCleanup(self.stop)
        wait_for(self.answers, 'the keeper')

    def answers(self):
        client = keeper_client.KeeperClient(self.socket)
        try:
            return client.ping()['pid'] == self.process.pid
        except errors.ContainerError:
            self.assertIsNone(self.process.poll())
            return False

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.assertEqual(0, self.process.wait(PATIENCE))
        with open(f'{self.dir}/log') as f:
            self.assertNotIn('Traceback', f.read())

    def read_json(self, name):
        with open(f'{self.dir}/{name}') as f:
            return json.load(f)

    def raw(self):
        """A connection that may send what it likes."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(sock.close)
        sock.settimeout(PATIENCE)
        sock.connect(self.socket)
        return sock

    def assertError(self, code, call, *args, **kwargs):
        with self.assertRaises(errors.ContainerError) as caught:
            call(*args, **kwargs)
        self.assertEqual(code, caught.exception.code, caught.exception)
        return caught.exception


class TestCommands(KeeperTestCase):

    def test_output_and_code_of_a_command_come_back(self):
        result = self.client.run(
            ['sh', '-c', 'echo out; echo err >&2; exit 3'])
        self.assertEqual(
            {'returncode': 3, 'stdout_tail': 'out\n',
             'stderr_tail': 'err\n'}, result)

    def test_a_signal_is_a_negative_code(self):
        result = self.client.run(['sh', '-c', 'kill -9 $$'])
        self.assertEqual(-9, result['returncode'])

    def test_the_command_gets_this_environment_and_no_other(self):
        result = self.client.run(['/usr/bin/env'], env={'A': 'b=c'}, cwd='/')
        self.assertEqual('A=b=c\n', result['stdout_tail'])
        result = self.client.run(['/usr/bin/env'])
        self.assertNotIn('PYTHONPATH', result['stdout_tail'])
        result = self.client.run(['pwd'], cwd='/proc')
        self.assertEqual('/proc\n', result['stdout_tail'])

    def test_the_command_is_in_a_session_of_its_own(self):
        result = self.client.run(
            ['sh', '-c', 'cut -d" " -f1,5,6 /proc/$$/stat'])
        pid, group, session = result['stdout_tail'].split()
        self.assertEqual((pid, pid), (group, session))

    def test_only_the_end_of_much_output_is_kept(self):
        result = self.client.run(
            ['sh', '-c', 'head -c 3000000 /dev/zero; echo end'])
        self.assertEqual(0, result['returncode'])
        self.assertEqual(
            keeper_process.TAIL_BYTES, len(result['stdout_tail']))
        self.assertTrue(result['stdout_tail'].endswith('\0end\n'))

    def test_a_command_that_does_not_exist_says_so(self):
        error = self.assertError(
            'internal', self.client.run, ['/nonexistent/command'])
        self.assertIn('/nonexistent/command', str(error))
        self.assertEqual('exec /nonexistent/command', error.step)
        self.assertEqual('No such file or directory', error.cause)
        self.assertError('internal', self.client.spawn, ['/nonexistent'])

    def test_a_run_that_takes_too_long_is_killed_with_its_group(self):
        error = self.assertError(
            'timeout', self.client.run,
            ['sh', '-c', 'echo stuck here >&2; sleep 1000 & echo $! >pids; '
             'echo $$ >>pids; wait'], cwd=self.dir, timeout_s=1)
        self.assertIn('stuck here', error.cause)
        with open(f'{self.dir}/pids') as f:
            pids = [int(line) for line in f]
        self.assertEqual(2, len(pids))
        for pid in pids:
            wait_for(lambda pid=pid: not os.path.exists(f'/proc/{pid}'),
                     'the killed process to be collected')

    def test_something_left_behind_with_the_pipe_does_not_delay(self):
        result = self.client.run(
            ['sh', '-c', 'sleep 1000 & echo $!'], timeout_s=PATIENCE)
        self.assertEqual(0, result['returncode'])
        os.kill(int(result['stdout_tail']), signal.SIGKILL)

    def test_commands_run_side_by_side(self):
        fifo = f'{self.dir}/fifo'
        os.mkfifo(fifo)
        results = []
        # Opening a fifo blocks until the other end is opened.
        reader = threading.Thread(target=lambda: results.append(
            self.client.run(['cat', fifo], timeout_s=PATIENCE)))
        reader.start()
        self.client.run(['sh', '-c', f'echo met > {fifo}'],
                        timeout_s=PATIENCE)
        reader.join(PATIENCE)
        self.assertEqual('met\n', results[0]['stdout_tail'])

    def test_descriptors_arrive_on_their_numbers_and_no_other_is_open(self):
        files = {}
        for number in (0, 1, 2, 3, 4, 9):
            files[number] = os.open(
                f'{self.dir}/{number}', os.O_RDWR | os.O_CREAT)
            self.addCleanup(os.close, files[number])
        # 3 and 4 are crossed on the way: what is passed for one number may
        # sit on another one's in the keeper.
        self.client.run(
            ['sh', '-c', 'for n in 0 1 2 3 4 9; do echo $n >&$n; done; '
             'exec ls /proc/self/fd'],
            fds={9: files[9], 0: files[0], 4: files[4], 3: files[3],
                 1: files[1], 2: files[2]})
        for number in (0, 2, 3, 4, 9):
            with open(f'{self.dir}/{number}') as f:
                self.assertEqual(f'{number}\n', f.read())
        with open(f'{self.dir}/1') as f:
            self.assertEqual('1', f.readline().strip())
            listed = {int(line) for line in f}
        # ls itself opens the directory, on the lowest free number.
        self.assertEqual({0, 1, 2, 3, 4, 9} | {5}, listed)

    def test_without_descriptors_only_standard_streams_are_open(self):
        result = self.client.run(['ls', '-l', '/proc/self/fd'])
        numbers = [line.split(' -> ')[0].split()[-1]
                   for line in result['stdout_tail'].splitlines()
                   if ' -> ' in line]
        self.assertEqual(['0', '1', '2', '3'], numbers)
        self.assertIn('0 -> /dev/null', result['stdout_tail'])

    def test_a_child_has_default_signals_and_the_usual_limits(self):
        with open('/proc/self/limits') as f:
            ours = [line for line in f if line.startswith('Max open files')]
        result = self.client.run(['cat', '/proc/self/status'])
        fields = dict(line.split(':\t') for line in
                      result['stdout_tail'].splitlines() if ':\t' in line)
        for name in ('SigIgn', 'SigBlk', 'SigCgt'):
            self.assertEqual(0, int(fields[name], 16), name)
        result = self.client.run(['cat', '/proc/self/limits'])
        self.assertIn(ours[0], result['stdout_tail'])

    def test_the_command_joins_the_cgroups_before_it_executes(self):
        with open('/proc/self/mounts') as f:
            mounts = [line.split() for line in f]
        roots = [m[1] for m in mounts if m[2] == 'cgroup2'] + [
            m[1] for m in mounts if m[2] == 'cgroup'
            and 'pids' in m[3].split(',')]
        procs = []
        name = f'pyc-keeper-test-{os.getpid()}'
        for root in roots:
            path = f'{root}/{name}'
            os.mkdir(path)
            self.addCleanup(os.rmdir, path)
            procs.append(f'{path}/cgroup.procs')
        self.assertTrue(procs, 'no cgroup hierarchy is mounted')
        result = self.client.run(
            ['cat', '/proc/self/cgroup'], cgroup_procs=procs)
        self.assertEqual(
            len(procs), result['stdout_tail'].count(name),
            result['stdout_tail'])

    def test_a_cgroup_that_cannot_be_joined_stops_the_command(self):
        error = self.assertError(
            'internal', self.client.run,
            ['touch', f'{self.dir}/ran'],
            cgroup_procs=['/sys/fs/cgroup/nonexistent/cgroup.procs'])
        self.assertIn('join /sys/fs/cgroup/nonexistent', error.step)
        self.assertFalse(os.path.exists(f'{self.dir}/ran'))

    def test_spawn_answers_with_a_live_child_of_the_keeper(self):
        pid = self.client.spawn(['sleep', '1000'])
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        with open(f'/proc/{pid}/stat') as f:
            parent = int(f.read().rpartition(')')[2].split()[1])
        self.assertEqual(self.client.ping()['pid'], parent)
        with open(f'/proc/{pid}/comm') as f:
            self.assertEqual('sleep\n', f.read())


class TestExits(KeeperTestCase):

    def orphan(self, script):
        """Start a process whose parent is gone; returns its pid.

        It waits for :meth:`go`, because a shell may collect a child that
        ends before the shell itself.
        """
        result = self.client.run(['sh', '-c', (
            f'(until [ -e {self.dir}/go ]; do sleep .02; done; {script}) '
            '</dev/null >/dev/null 2>&1 & echo $!')])
        return int(result['stdout_tail'])

    def go(self):
        open(f'{self.dir}/go', 'w').close()

    def wait_exit(self, name):
        wait_for(lambda: os.path.exists(f'{self.dir}/{name}'), 'the exit')
        return self.read_json(name)

    def test_the_code_of_an_orphaned_grandchild_is_written(self):
        pid = self.orphan('exit 42')
        born = keeper_process.start_time(pid)
        before = time.time()
        self.assertFalse(self.client.watch(
            self.uuid, pid, f'{self.dir}/exit', born))
        self.assertEqual([pid], self.client.list()[0]['pids'])
        self.go()
        exit_ = self.wait_exit('exit')
        at = exit_.pop('at')
        self.assertEqual(
            {'format': 1, 'pid': pid, 'code': 42, 'signal': None}, exit_)
        self.assertGreaterEqual(at, before)
        mode = os.stat(f'{self.dir}/exit').st_mode
        self.assertEqual(0o600, stat.S_IMODE(mode))
        self.assertEqual([], glob.glob(f'{self.dir}/*.tmp'))
        self.assertEqual([], self.client.list())

    def test_a_signal_is_written(self):
        pid = self.orphan('true')
        self.client.watch(self.uuid, pid, f'{self.dir}/exit')
        os.kill(pid, signal.SIGKILL)
        exit_ = self.wait_exit('exit')
        self.assertEqual((None, 9), (exit_['code'], exit_['signal']))

    def test_an_exit_before_the_watch_is_not_lost(self):
        pid = self.orphan('exit 7')
        self.go()
        wait_for(lambda: not os.path.exists(f'/proc/{pid}'), 'the end')
        self.assertTrue(
            self.client.watch(self.uuid, pid, f'{self.dir}/exit'))
        self.assertEqual(7, self.read_json('exit')['code'])
        # Told once, forgotten: the number may be somebody else's soon.
        self.assertError('not_found', self.client.watch, self.uuid, pid,
                         f'{self.dir}/exit')

    def test_another_process_with_the_same_number_is_not_taken(self):
        pid = self.orphan('true')
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        born = keeper_process.start_time(pid)
        self.assertError('not_found', self.client.watch, self.uuid, pid,
                         f'{self.dir}/exit', born + 1)

    def test_subscribers_hear_of_watched_exits_only(self):
        with self.client.subscribe() as one, self.client.subscribe() as two:
            self.orphan('exit 1')
            pid = self.orphan('exit 5')
            self.client.watch(self.uuid, pid, f'{self.dir}/exit')
            self.go()
            for subscription in (one, two):
                event = subscription.get(PATIENCE)
                self.assertEqual(
                    ('exit', self.uuid, pid, 5, None),
                    (event['event'], event['uuid'], event['pid'],
                     event['code'], event['signal']))
                # On the disk before anybody is told.
                self.assertEqual(5, self.read_json('exit')['code'])
            self.assertIsNone(one.get(0.05))

    def test_a_directory_that_is_gone_is_survived(self):
        pid = self.orphan('exit 1')
        with self.client.subscribe() as subscription:
            self.client.watch(self.uuid, pid, f'{self.dir}/gone/exit')
            self.go()
            self.assertEqual(1, subscription.get(PATIENCE)['code'])
        self.client.ping()

    def test_a_process_of_another_parent_is_watched_too(self):
        # As after a restart of the keeper.
        child = subprocess.Popen(['sh', '-c', 'read x; exit 9'],
                                 stdin=subprocess.PIPE)
        self.assertFalse(self.client.watch(
            self.uuid, child.pid, f'{self.dir}/exit',
            keeper_process.start_time(child.pid)))
        child.communicate(b'go\n')
        exit_ = self.wait_exit('exit')
        version = tuple(int(p) for p in os.uname().release.split('.')[:2])
        # Linux before 6.15 does not tell a stranger how it ended.
        self.assertEqual(
            9 if version >= (6, 15) else None, exit_['code'])

    def test_a_thousand_orphans_are_remembered_and_no_more(self):
        pids = [self.client.spawn(['true']) for _ in range(
            keeper_children.MAX_EXITS + 3)]
        for pid in pids:
            wait_for(lambda pid=pid: not os.path.exists(f'/proc/{pid}'),
                     'the end')
        path = f'{self.dir}/exit'
        for pid in pids[:3]:
            self.assertError(
                'not_found', self.client.watch, self.uuid, pid, path)
        for pid in pids[3:]:
            self.assertTrue(self.client.watch(self.uuid, pid, path))


class TestConsoles(KeeperTestCase):

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
        ours.settimeout(PATIENCE)
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
        wait_for(lambda: data in self.logged(), f'{data!r} in the log')

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
        thread.join(PATIENCE)
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
            wait_for(lambda: self.client.list()[0]['console']['idle'],
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
        wait_for(lambda: self.client.list()[0]['console']['idle'], 'EIO')
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
        wait_for(lambda: self.client.list()[0]['console']['viewers'] == 2,
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
        thread.join(PATIENCE)
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


class TestProtocol(KeeperTestCase):

    def ask(self, packet):
        """Send one packet; returns the answer and whether we were cut off."""
        sock = self.raw()
        sock.send(packet)
        answer = json.loads(sock.recv(keeper.MAX_PACKET))
        sock.settimeout(0.2)
        try:
            closed = sock.recv(1) == b''
        except TimeoutError:
            closed = False
        return answer, closed

    def test_the_socket_is_roots_alone(self):
        mode = os.stat(self.socket).st_mode
        self.assertEqual(0o600, stat.S_IMODE(mode))

    def test_garbage_is_refused_and_its_sender_disconnected(self):
        for packet in (
            b'garbage', b'\xff\xfe', b'{"v": 1, "id"', b'[]', b'null',
            b'{}', b'{"v": 1, "id": true, "verb": "ping"}',
            b'{"v": 1, "id": 1, "verb": "ping", "params": []}',
            b'[' * 50000, b'\0',
        ):
            with self.subTest(packet=packet[:60]):
                answer, closed = self.ask(packet)
                self.assertEqual('invalid', answer['error']['code'])
                self.assertTrue(closed)
        self.client.ping()

    def test_another_version_is_refused_by_name(self):
        answer, closed = self.ask(
            b'{"v": 2, "id": 1, "verb": "ping", "params": {}}')
        self.assertEqual('unsupported', answer['error']['code'])
        self.assertIn('version 1', answer['error']['message'])
        self.assertTrue(closed)

    def test_a_packet_that_is_too_large_is_refused(self):
        request = {'v': 1, 'id': 1, 'verb': 'run', 'params': {
            'argv': ['touch', f'{self.dir}/ran', 'x' * keeper.MAX_PACKET],
            'timeout_s': 5}}
        answer, closed = self.ask(json.dumps(request).encode())
        self.assertEqual('invalid', answer['error']['code'])
        self.assertIn('too large', answer['error']['message'])
        self.assertTrue(closed)
        self.assertFalse(os.path.exists(f'{self.dir}/ran'))

    def test_a_part_of_a_packet_is_refused(self):
        whole = json.dumps({'v': 1, 'id': 1, 'verb': 'run', 'params': {
            'argv': ['touch', f'{self.dir}/ran'], 'timeout_s': 5}}).encode()
        for size in (1, len(whole) // 2, len(whole) - 1):
            answer, closed = self.ask(whole[:size])
            self.assertEqual('invalid', answer['error']['code'])
            self.assertTrue(closed)
        self.assertFalse(os.path.exists(f'{self.dir}/ran'))

    def test_wrong_parameters_are_refused_and_the_peer_may_go_on(self):
        good = {'argv': ['true'], 'timeout_s': 5}
        wrong = [
            ('nosuch', {}), ('run', {}), ('run', {**good, 'argv': []}),
            ('run', {**good, 'argv': 'true'}),
            ('run', {**good, 'argv': ['']}),
            ('run', {**good, 'argv': ['a\0b']}),
            ('run', {**good, 'argv': ['\ud800']}),
            ('run', {**good, 'timeout_s': 0}),
            ('run', {**good, 'timeout_s': True}),
            ('run', {**good, 'timeout_s': float('nan')}),
            ('run', {**good, 'cwd': 'relative'}),
            ('run', {**good, 'env': {'A=B': 'c'}}),
            ('run', {**good, 'fds': [0]}),
            ('run', {**good, 'fds': [-1]}),
            ('run', {**good, 'extra': 1}),
            ('watch', {'uuid': '../x', 'pid': 1, 'exit_path': '/x'}),
            ('watch', {'uuid': 'x', 'pid': 0, 'exit_path': '/x'}),
            ('watch', {'uuid': 'x', 'pid': 1, 'exit_path': 'x'}),
            ('hold', {'uuid': 'x', 'log_path': '/x', 'max_bytes': 65536}),
            ('attach', {'uuid': 'x', 'mode': 'w'}),
            ('resize', {'uuid': 'x', 'rows': 0, 'columns': 1}),
            ('list', {'after': 5}),
        ]
        sock = self.raw()
        for number, (verb, params) in enumerate(wrong):
            with self.subTest(verb=verb, params=params):
                sock.send(json.dumps({
                    'v': 1, 'id': number, 'verb': verb,
                    'params': params}).encode())
                answer = json.loads(sock.recv(keeper.MAX_PACKET))
                self.assertEqual(number, answer['id'])
                self.assertEqual('invalid', answer['error']['code'])
        sock.send(b'{"v": 1, "id": 99, "verb": "ping"}')
        self.assertEqual(99, json.loads(sock.recv(4096))['id'])

    def test_another_user_is_refused_even_with_a_socket_that_is_open(self):
        # As an operator who has opened the permissions by mistake.
        os.chmod(self.dir, 0o755)
        os.chmod(self.socket, 0o666)
        script = (
            'import socket, sys\n'
            's = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n'
            's.connect(sys.argv[1])\n'
            'try:\n'
            '    s.send(b\'{"v": 1, "id": 1, "verb": "ping"}\')\n'
            '    print(s.recv(4096))\n'
            'except OSError as e:\n'
            '    print(e)\n')
        result = subprocess.run(
            ['setpriv', '--reuid=65534', '--clear-groups',
             '/usr/bin/python3', '-c', script, self.socket],
            capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual(0, result.returncode, result.stderr)
        self.assertNotIn('version', result.stdout)

    def test_no_descriptor_stays_behind(self):
        pid = self.client.ping()['pid']
        before = descriptors(pid, sockets=1)
        null = os.open('/dev/null', os.O_RDWR)
        self.addCleanup(os.close, null)
        # Refused in every way there is, with descriptors beside it.
        for packet in (
            b'garbage', b'{"v": 1, "id": 1, "verb": "ping"}',
            b'{"v": 1, "id": 1, "verb": "nosuch"}',
            b'{"v": 1, "id": 1, "verb": "hold", "params": {"uuid": "x", '
            b'"log_path": "/nonexistent/x", "max_bytes": 65536}}',
            b'{"v": 1, "id": 1, "verb": "attach", "params": {"uuid": "x"}}',
            b'x' * (keeper.MAX_PACKET + 1),
        ):
            for count in (1, keeper.MAX_FDS, keeper.MAX_FDS + 9):
                sock = self.raw()
                socket.send_fds(sock, [packet], [null] * count)
                self.assertIn('error', json.loads(sock.recv(4096)))
                sock.close()
        # And accepted, to the end.
        for _ in range(3):
            self.client.run(['true'], fds={0: null, 5: null})
            self.assertError('internal', self.client.run, ['/nonexistent'],
                             fds={0: null})
            pid_ = self.client.spawn(['true'], fds={1: null})
            self.client.watch('x', pid_, f'{self.dir}/exit')
            master, slave = pty.openpty()
            self.client.hold('x', master, f'{self.dir}/log2', 65536)
            self.client.hold('x', master, f'{self.dir}/log2', 65536)
            ours, theirs = socket.socketpair()
            self.client.attach('x', theirs.fileno())
            self.client.subscribe().close()
            self.client.release('x')
            for fd in (master, slave):
                os.close(fd)
            ours.close()
            theirs.close()
        self.assertEqual(before, descriptors(pid, sockets=1))

    def test_a_client_that_dies_harms_nobody(self):
        # In the middle of its command: that runs on.
        sock = self.raw()
        sock.send(json.dumps({'v': 1, 'id': 1, 'verb': 'run', 'params': {
            'argv': ['sh', '-c',
                     f'until [ -e {self.dir}/go ]; do sleep .05; done; '
                     f'touch {self.dir}/ran'], 'timeout_s': 50}}).encode())
        sock.close()
        self.client.ping()
        open(f'{self.dir}/go', 'w').close()
        wait_for(lambda: os.path.exists(f'{self.dir}/ran'), 'the command')
        # As a subscriber, and as a viewer, without a goodbye.
        subscriber = self.client.subscribe()
        slave = self.hold_console()
        ours, theirs = socket.socketpair()
        self.client.attach(self.uuid, theirs.fileno())
        theirs.close()
        subscriber.close()
        ours.close()
        os.write(slave, b'anybody?')
        pid = self.client.spawn(['true'])
        self.client.watch(self.uuid, pid, f'{self.dir}/exit')
        wait_for(lambda: os.path.exists(f'{self.dir}/exit'), 'the exit')
        wait_for(lambda: not self.client.list()[0]['console']['viewers'],
                 'the viewer to be forgotten')
        os.close(slave)

    def hold_console(self):
        master, slave = pty.openpty()
        self.client.hold(self.uuid, master, f'{self.dir}/c.log', 65536)
        os.close(master)
        return slave

    def test_a_subscriber_that_does_not_read_is_cut_off(self):
        lazy = self.raw()
        lazy.send(b'{"v": 1, "id": 1, "verb": "subscribe"}')
        self.assertEqual({}, json.loads(lazy.recv(4096))['result'])
        pid = self.client.ping()['pid']
        descriptors(pid, sockets=2)
        # The kernel keeps some for it, the keeper MAX_QUEUE more.
        for _ in range(2 * keeper.MAX_QUEUE):
            child = self.client.spawn(['true'])
            self.client.watch(self.uuid, child, f'{self.dir}/exit')
            if sum(name.startswith('socket:')
                   for name in _descriptors(pid)) == 1:
                break
        descriptors(pid, sockets=1)


class TestProcess(KeeperTestCase):

    def test_it_imports_nothing_heavy_and_stays_small(self):
        pid = self.client.ping()['pid']
        with open(f'/proc/{pid}/maps') as f:
            self.assertNotIn('site-packages', f.read())
        with open(f'/proc/{pid}/status') as f:
            rss = [line for line in f if line.startswith('VmRSS')][0]
        self.assertLess(int(rss.split()[1]), 15 * 1024)

    def test_a_second_keeper_on_the_same_socket_gives_up(self):
        argv, env = keeper_client.command(self.socket)
        result = subprocess.run(
            argv, env=env, capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual(1, result.returncode)
        self.assertIn('another keeper', result.stderr)
        self.assertEqual(self.process.pid, self.client.ping()['pid'])

    def test_it_ends_on_sigterm_and_leaves_children_alone(self):
        pid = self.client.spawn(['sleep', '1000'])
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        self.process.terminate()
        self.assertEqual(0, self.process.wait(PATIENCE))
        self.assertFalse(os.path.exists(self.socket))
        os.kill(pid, 0)
        self.assertError('keeper_unavailable', self.client.ping)

    def test_a_keeper_that_was_killed_is_replaced(self):
        self.process.kill()
        self.process.wait(PATIENCE)
        self.assertTrue(os.path.exists(self.socket))
        self.assertError('keeper_unavailable', self.client.ping)
        self.start()
        self.client.ping()


class TestRestart(KeeperTestCase):
    """What a keeper takes up that is started in place of another."""

    def setUp(self):
        # What systemd does with its descriptor store, over real sockets.
        self.store = {}
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.manager.close)
        address = f'\0pyc-keeper-{uuidlib.uuid4()}'
        self.manager.bind(address)
        self.manager.settimeout(0.2)
        self.addCleanup(
            lambda: [os.close(fd) for fd in self.store.values()])
        self.address = '@' + address[1:]
        super().setUp()

    def start(self):
        names = sorted(self.store)
        fds = [str(self.store[name]) for name in names]
        env = {'NOTIFY_SOCKET': self.address}
        prefix = []
        if names:
            env |= {'LISTEN_FDS': str(len(names)),
                    'LISTEN_FDNAMES': ':'.join(names)}
            # All out of the way of each other's numbers first.
            prefix = ['/usr/bin/python3', '-c', (
                'import fcntl, os, sys\n'
                'count = int(sys.argv[1])\n'
                'for n, fd in enumerate([\n'
                '    fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 100)\n'
                '    for fd in sys.argv[2:2 + count]\n'
                ']):\n'
                '    os.dup2(fd, 3 + n)\n'
                'os.environ["LISTEN_PID"] = str(os.getpid())\n'
                'os.execv(sys.argv[2 + count], sys.argv[2 + count:])\n'),
                str(len(names)), *fds]
        super().start(env=env, prefix=prefix,
                      pass_fds=[int(fd) for fd in fds])
        self.assertIn('READY=1', self.told())

    def told(self):
        """Take what the keeper has told; returns the messages' first lines.
        """
        said = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.manager, 4096, 4)
            except TimeoutError:
                return said
            fields = dict(
                line.partition('=')[::2]
                for line in data.decode().splitlines())
            said.append(data.decode().splitlines()[0])
            if 'FDSTORE' in fields:
                self.assertEqual('0', fields['FDPOLL'])
                self.store[fields['FDNAME']], = fds
            elif 'FDSTOREREMOVE' in fields and fields['FDNAME'] in self.store:
                os.close(self.store.pop(fields['FDNAME']))

    def restart(self, number):
        self.process.send_signal(number)
        self.process.wait(PATIENCE)
        self.told()
        self.start()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE)

    def hold(self):
        master, slave = pty.openpty()
        self.addCleanup(os.close, slave)
        tty.setraw(slave)
        self.client.hold(self.uuid, master, f'{self.dir}/c.log', 65536)
        os.close(master)
        return slave

    def logged(self):
        with open(f'{self.dir}/c.log', 'rb') as f:
            return f.read()

    def test_consoles_go_on_with_systemds_store(self):
        slave = self.hold()
        name = os.ttyname(slave)
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.write(slave, b'before ')
            wait_for(lambda: self.logged().endswith(b'before '), 'it')
            self.restart(number)
            # No hang-up for the guest, and nothing lost.
            os.write(slave, b'after ')
            wait_for(lambda: self.logged().endswith(b'after '), 'it')
            ours, theirs = socket.socketpair()
            self.client.attach(self.uuid, theirs.fileno())
            theirs.close()
            ours.sendall(b'typed')
            self.assertEqual(b'typed', os.read(slave, 100))
            ours.close()
        self.assertEqual(b'before after before after ', self.logged())
        self.assertTrue(os.path.exists(name))
        self.client.release(self.uuid)
        self.told()
        self.assertEqual({}, self.store)
        self.assertEqual([], os.listdir(f'{self.socket}.d'))

    def test_a_new_master_replaces_the_stored_one(self):
        self.hold()
        slave = self.hold()
        self.told()
        self.assertEqual(1, len(self.store))
        self.restart(signal.SIGKILL)
        os.write(slave, b'second')
        wait_for(lambda: self.logged() == b'second', 'it')

    def test_without_a_store_the_console_is_given_up(self):
        slave = self.hold()
        self.told()
        os.close(self.store.pop(self.uuid))
        self.restart(signal.SIGKILL)
        self.assertEqual([], self.client.list())
        with open(f'{self.dir}/log') as f:
            self.assertIn(f'the console of {self.uuid} is lost', f.read())
        # It can be held anew.
        self.assertEqual(b'', os.read(slave, 1))
        self.hold()

    def test_exits_are_awaited_by_the_next_keeper(self):
        result = self.client.run(['sh', '-c', (
            f'(until [ -e {self.dir}/go ]; do sleep .02; done; exit 6) '
            '</dev/null >/dev/null 2>&1 & echo $!')])
        pid = int(result['stdout_tail'])
        path = f'{self.dir}/exit'
        self.client.watch(self.uuid, pid, path)
        self.restart(signal.SIGKILL)
        self.assertEqual([pid], self.client.list()[0]['pids'])
        open(f'{self.dir}/go', 'w').close()
        wait_for(lambda: os.path.exists(path), 'the exit')
        found = self.read_json('exit')
        version = tuple(int(p) for p in os.uname().release.split('.')[:2])
        self.assertEqual(
            (pid, 6 if version >= (6, 15) else None, None),
            (found['pid'], found['code'], found['signal']))
        self.assertEqual([], os.listdir(f'{self.socket}.d'))

    def test_an_exit_between_two_keepers_is_known_to_be_unknown(self):
        pid = self.client.spawn(['sleep', '1000'])
        path = f'{self.dir}/exit'
        self.client.watch(self.uuid, pid, path)
        self.process.kill()
        self.process.wait(PATIENCE)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not os.path.exists(f'/proc/{pid}'), 'its end')
        self.start()
        found = self.read_json('exit')
        self.assertEqual(
            (pid, None, None),
            (found['pid'], found['code'], found['signal']))

    def test_files_that_make_no_sense_are_thrown_away(self):
        self.process.kill()
        self.process.wait(PATIENCE)
        for name, text in (
                ('a.json', ''), ('b.json', '[]'), ('c.json', '{}'),
                ('d.json', '{"format": 2}'), ('e.json.new', '{'),
                ('f.json', '{"format": 1, "watches": [[1]], '
                           '"console": null}'),
                ('g.json', '{"format": 1, "watches": 5, "console": 1}')):
            with open(f'{self.socket}.d/{name}', 'w') as f:
                f.write(text)
        self.start()
        self.assertEqual([], self.client.list())
        self.assertEqual([], os.listdir(f'{self.socket}.d'))


class TestEnsureKeeper(unittest.TestCase):

    def setUp(self):
        super().setUp()
        if os.geteuid():
            self.skipTest('the keeper is a root process: run as root')
        directory = tempfile.TemporaryDirectory(prefix='pyc-keeper-')
        self.addCleanup(directory.cleanup)
        self.socket = f'{directory.name}/run/keeper.sock'
        self.addCleanup(self.kill)

    def kill(self):
        client = keeper_client.KeeperClient(self.socket)
        try:
            os.kill(client.ping()['pid'], signal.SIGTERM)
        except errors.ContainerError:
            return
        wait_for(lambda: not os.path.exists(self.socket), 'its end')

    def test_eight_starters_at_once_get_the_same_keeper(self):
        script = (
            'import sys\n'
            'from nova_pycontainer.runtime import keeper_client\n'
            'print(keeper_client.ensure_keeper(sys.argv[1])["pid"])\n')
        starters = [
            subprocess.Popen([sys.executable, '-c', script, self.socket],
                             stdout=subprocess.PIPE, text=True)
            for _ in range(8)]
        pids = {s.communicate(timeout=PATIENCE)[0].strip() for s in starters}
        self.assertEqual([0] * 8, [s.returncode for s in starters])
        self.assertEqual(1, len(pids), pids)
        # It has outlived its starter, in a session of its own.
        pid = int(pids.pop())
        self.assertEqual(pid, os.getsid(pid))
        self.assertEqual(
            pid, keeper_client.ensure_keeper(self.socket)['pid'])

    def test_the_keeper_has_nothing_of_its_starter(self):
        secret = os.open('/dev/zero', os.O_RDONLY)
        self.addCleanup(os.close, secret)
        os.set_inheritable(secret, True)
        pid = keeper_client.ensure_keeper(self.socket)['pid']
        self.assertNotIn('/dev/zero', _descriptors(pid))
        self.assertEqual('/', os.readlink(f'/proc/{pid}/cwd'))
        with open(f'/proc/{pid}/environ') as f:
            names = {v.partition('=')[0] for v in f.read().split('\0') if v}
        self.assertLessEqual(names, {'PATH', 'LC_ALL', 'LANG'})

    def test_a_python_that_is_missing_says_so(self):
        with self.assertRaises(errors.ContainerError) as caught:
            keeper_client.ensure_keeper(self.socket, '/nonexistent/python')
        self.assertEqual('keeper_unavailable', caught.exception.code)
        self.assertIn('/nonexistent/python', str(caught.exception))

    def test_a_socket_directory_that_cannot_be_made_says_so(self):
        with self.assertRaises(errors.ContainerError) as caught:
            keeper_client.ensure_keeper('/proc/nonexistent/keeper.sock')
        self.assertEqual('keeper_unavailable', caught.exception.code)
