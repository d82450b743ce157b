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

"""The beginning, the end and the return of a keeper."""

import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import tty
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from tests import cases
from tests.runtime import keeper_base as base


class TestProcess(base.KeeperTestCase):

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
            argv, env=env, capture_output=True, text=True,
            timeout=base.PATIENCE)
        self.assertEqual(1, result.returncode)
        self.assertIn('another keeper', result.stderr)
        self.assertEqual(self.process.pid, self.client.ping()['pid'])

    def test_it_ends_on_sigterm_and_leaves_children_alone(self):
        pid = self.client.spawn(['sleep', '1000'])
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        self.process.terminate()
        self.assertEqual(0, self.process.wait(base.PATIENCE))
        self.assertFalse(os.path.exists(self.socket))
        os.kill(pid, 0)
        self.assertError('keeper_unavailable', self.client.ping)

    def test_a_keeper_that_was_killed_is_replaced(self):
        self.process.kill()
        self.process.wait(base.PATIENCE)
        self.assertTrue(os.path.exists(self.socket))
        self.assertError('keeper_unavailable', self.client.ping)
        self.start()
        self.client.ping()


class TestRestart(base.KeeperTestCase):
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
        self.process.wait(base.PATIENCE)
        self.told()
        self.start()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(base.PATIENCE)

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
            base.wait_for(lambda: self.logged().endswith(b'before '), 'it')
            self.restart(number)
            # No hang-up for the guest, and nothing lost.
            os.write(slave, b'after ')
            base.wait_for(lambda: self.logged().endswith(b'after '), 'it')
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
        base.wait_for(lambda: self.logged() == b'second', 'it')

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
        base.wait_for(lambda: os.path.exists(path), 'the exit')
        found = self.read_json('exit')
        version = tuple(int(p) for p in os.uname().release.split('.')[:2])
        self.assertEqual(
            (pid, 6 if version >= (6, 15) else None, None),
            (found['pid'], found['code'], found['signal']))
        # Only then is it forgotten.
        base.wait_for(lambda: not os.listdir(f'{self.socket}.d'),
                      'the watch to be forgotten')

    def test_an_exit_between_two_keepers_is_known_to_be_unknown(self):
        pid = self.client.spawn(['sleep', '1000'])
        path = f'{self.dir}/exit'
        self.client.watch(self.uuid, pid, path)
        self.process.kill()
        self.process.wait(base.PATIENCE)
        os.kill(pid, signal.SIGKILL)
        base.wait_for(lambda: not os.path.exists(f'/proc/{pid}'), 'its end')
        self.start()
        found = self.read_json('exit')
        self.assertEqual(
            (pid, None, None),
            (found['pid'], found['code'], found['signal']))

    def test_files_that_make_no_sense_are_thrown_away(self):
        self.process.kill()
        self.process.wait(base.PATIENCE)
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


class TestEnsureKeeper(cases.TestCase):

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
        base.wait_for(lambda: not os.path.exists(self.socket), 'its end')

    def test_eight_starters_at_once_get_the_same_keeper(self):
        script = (
            'import sys\n'
            'from nova_pycontainer.runtime import keeper_client\n'
            'print(keeper_client.ensure_keeper(sys.argv[1])["pid"])\n')
        starters = [
            subprocess.Popen([sys.executable, '-c', script, self.socket],
                             stdout=subprocess.PIPE, text=True)
            for _ in range(8)]
        pids = {s.communicate(timeout=base.PATIENCE)[0].strip()
                for s in starters}
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
        self.assertNotIn('/dev/zero', base.open_files(pid))
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
