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

"""A keeper that is older than its agent, and one that was killed."""

import os
import signal

import fixtures

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import keeper_params
from nova_pycontainer.runtime import process
from tests.runtime import base
from tests.runtime import keeper_base

#: Makes a keeper one of a release that had no list of features.
OLD = ('from nova_pycontainer.runtime import keeper_params; '
       'del keeper_params.VERBS["hold"]["fresh?"]; '
       'keeper_params.features = list; ')


class OldKeeperTestCase(keeper_base.KeeperTestCase):

    def start(self, **kwargs):
        argv, env = keeper_client.command(self.socket)
        start, = (text for text in argv if 'keeper.main' in text)
        old = start.replace('from nova', OLD + 'from nova', 1)
        real = keeper_client.command
        keeper_client.command = lambda path: (
            [old if text == start else text for text in argv], env)
        try:
            super().start(**kwargs)
        finally:
            keeper_client.command = real

    def test_parameter_that_it_does_not_know(self):
        self.assertEqual([], self.client.ping()['features'])
        master, slave = os.openpty()
        self.addCleanup(os.close, slave)
        self.addCleanup(os.close, master)
        # Told by itself, it refuses.
        error = self.assertError(
            'invalid', self.client._call, 'hold', {
                'uuid': self.uuid, 'log_path': f'{self.dir}/console',
                'max_bytes': 8192, 'fresh': True}, [master])
        self.assertIn('unknown parameter', str(error))
        with self.assertLogs(
                'nova_pycontainer.runtime.keeper_client') as logs:
            self.client.hold(
                self.uuid, master, f'{self.dir}/console', 8192, fresh=True)
        self.assertIn('hold.fresh', logs.output[0])
        os.write(slave, b'hello')
        keeper_base.wait_for(
            lambda: os.path.exists(f'{self.dir}/console') and
            os.path.getsize(f'{self.dir}/console'), 'the output')


class NewKeeperTestCase(keeper_base.KeeperTestCase):

    def test_features(self):
        self.assertEqual(
            keeper_params.features(), self.client.ping()['features'])
        self.assertIn('hold.fresh', self.client.ping()['features'])


class KilledKeeperTestCase(base.HostTestCase):

    def kill_keeper(self):
        pid = self.host.keeper.ping()['pid']
        pidfd = os.pidfd_open(pid)
        try:
            process.send_signal(pidfd, signal.SIGKILL)
            self.assertTrue(process.exited(pidfd, base.PATIENCE))
        finally:
            os.close(pidfd)
        return pid

    def test_agent_starts_another(self):
        first = self.run_container()
        killed = self.kill_keeper()
        # What runs is not concerned, and what is new needs a keeper.
        self.assertEqual('running', self.state(first))
        second = self.run_container()
        self.assertNotEqual(killed, self.host.keeper.ping()['pid'])
        self.sh(second, 'true')
        self.wait_console(second, '')
        # It knows of the end of both.
        for uuid in (first, second):
            self.host.kill(uuid)
            self.wait_state(uuid, 'stopped')
        self.assertEqual(9, self.host.info(second)['exit']['signal'])

    def test_it_has_no_more_than_the_first(self):
        """The agent raises its own limit, which is not for containers."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.keeper_client._OPEN_FILES', 512))
        self.kill_keeper()
        done = self.host.keeper.run(['sh', '-c', 'ulimit -Sn'])
        self.assertEqual('512', done['stdout_tail'].strip())

    def test_without_an_interpreter(self):
        """Whoever only looks starts none."""
        client = keeper_client.KeeperClient(self.config.keeper_socket)
        self.kill_keeper()
        self.assert_code('keeper_unavailable', client.ping)


class WatchTestCase(base.HostTestCase):

    def test_watched_by_its_start(self):
        """A pid alone may be another process by now."""
        seen = []
        real = keeper_client.KeeperClient.watch

        def watch(client, uuid, pid, path, start_time=None):
            seen.append((pid, start_time))
            return real(client, uuid, pid, path, start_time)

        keeper_client.KeeperClient.watch = watch
        self.addCleanup(setattr, keeper_client.KeeperClient, 'watch', real)
        uuid = self.run_container()
        pid = self.host.info(uuid)['pid']
        self.assertEqual(
            [(pid, process.ProcessId.of(pid).start_time)], seen)
        error = self.assertRaises(
            errors.ContainerError, self.host.keeper.watch, uuid, pid,
            self.config.run_dir / 'exit.json', seen[0][1] + 1)
        self.assertEqual('not_found', error.code)
