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

"""Commands that the keeper runs, and exits that it records."""

import glob
import os
import signal
import stat
import subprocess
import threading
import time

from nova_pycontainer.runtime import keeper_children
from nova_pycontainer.runtime import keeper_process
from tests.runtime import keeper_base as base


class TestCommands(base.KeeperTestCase):

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
            base.wait_for(lambda pid=pid: not os.path.exists(f'/proc/{pid}'),
                          'the killed process to be collected')

    def test_something_left_behind_with_the_pipe_does_not_delay(self):
        result = self.client.run(
            ['sh', '-c', 'sleep 1000 & echo $!'], timeout_s=base.PATIENCE)
        self.assertEqual(0, result['returncode'])
        os.kill(int(result['stdout_tail']), signal.SIGKILL)

    def test_commands_run_side_by_side(self):
        fifo = f'{self.dir}/fifo'
        os.mkfifo(fifo)
        results = []
        # Opening a fifo blocks until the other end is opened.
        reader = threading.Thread(target=lambda: results.append(
            self.client.run(['cat', fifo], timeout_s=base.PATIENCE)))
        reader.start()
        self.client.run(['sh', '-c', f'echo met > {fifo}'],
                        timeout_s=base.PATIENCE)
        reader.join(base.PATIENCE)
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
        # Another file system may be mounted on top.
        roots = [r for r in roots if os.path.exists(f'{r}/cgroup.procs')]
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

        def name():
            with open(f'/proc/{pid}/comm') as f:
                return f.read()

        # The kernel gives it a little after it has closed what the keeper
        # sees closed.
        base.wait_for(lambda: name() == 'sleep\n', 'the name of sleep')


class TestExits(base.KeeperTestCase):

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
        base.wait_for(lambda: os.path.exists(f'{self.dir}/{name}'), 'the exit')
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
        base.wait_for(lambda: not os.path.exists(f'/proc/{pid}'), 'the end')
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
                event = subscription.get(base.PATIENCE)
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
            self.assertEqual(1, subscription.get(base.PATIENCE)['code'])
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
        def ended(count):
            pids = [self.client.spawn(['true']) for _ in range(count)]
            for pid in pids:
                base.wait_for(
                    lambda pid=pid: not os.path.exists(f'/proc/{pid}'),
                    'the end')
            return pids

        # They are forgotten in the order of their ends, which is not that of
        # their starts.
        first, others = ended(3), ended(keeper_children.MAX_EXITS)
        path = f'{self.dir}/exit'
        for pid in first:
            self.assertError(
                'not_found', self.client.watch, self.uuid, pid, path)
        for pid in others:
            self.assertTrue(self.client.watch(self.uuid, pid, path))
