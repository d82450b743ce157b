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

"""How much the agent serves, to whom, and its end."""

import concurrent.futures
import grp
import os
import pathlib
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import time

from nova_pycontainer.agent import client
from nova_pycontainer.agent import server
from nova_pycontainer.runtime import errors
from tests.unit.agent import base


class TestLimits(base.AgentTestCase):

    def test_a_slow_verb_is_given_up_and_goes_on(self):
        self.host.gate.clear()
        hasty = client.Client(self.path, 0.2)
        error = self.assert_code('timeout', hasty.host_info)
        self.assertIn('within 0.2 s', str(error))
        self.assertIn('goes on', error.remedy)
        # Others are served meanwhile.
        self.assertEqual([], self.client.list())

    def test_what_a_verb_is_told_to_wait_comes_on_top(self):
        self.define()
        self.host.gate.clear()
        hasty = client.Client(self.path, 3)
        # It uses all of its own seconds; the call has as many more.
        self.assertEqual(
            {'code': None, 'signal': 9}, hasty.stop(self.uuid, 3))

    def test_verbs_at_work_are_bounded(self):
        self.server.stop(base.PATIENCE)
        self.serve(max_running=2)
        self.host.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            busy = [pool.submit(self.client.host_info) for _ in range(2)]
            for _ in busy:
                self.host.wait_entered()
            hasty = client.Client(self.path, 0.2)
            self.assert_code('timeout', hasty.list)
            self.host.gate.set()
            for one in busy:
                self.assertEqual({'cpus': 2}, one.result(base.PATIENCE))
        self.assertEqual([], self.client.list())

    def test_connections_are_bounded_and_the_rest_is_told(self):
        self.server.stop(base.PATIENCE)
        made = self.serve(max_connections=3)
        idle = []
        for _ in range(3):
            idle.append(socket.socket(socket.AF_UNIX))
            idle[-1].connect(self.path)
        while made._active < 3:
            time.sleep(0.01)
        error = self.assertRaises(
            errors.AgentUnavailable, self.client.list)
        self.assertIn('too many connections', str(error))
        for sock in idle:
            sock.close()
        with made._idle:
            self.assertTrue(made._idle.wait_for(
                lambda: not made._active, base.PATIENCE))
        self.assertEqual([], self.client.list())


class TestServing(base.AgentTestCase):

    def test_a_second_agent_on_the_same_socket_gives_up(self):
        error = self.assert_code(
            'exists', server.AgentServer, self.path, self.host)
        self.assertIn(self.path, str(error))
        # And has not taken the first one's socket away.
        self.assertEqual([], self.client.list())

    def test_a_socket_that_a_killed_agent_left_is_taken_over(self):
        self.server.stop(base.PATIENCE)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path)
        self.serve()
        self.assertEqual([], self.client.list())

    def test_to_stop_twice_is_to_stop_once(self):
        self.assertTrue(self.server.stop(base.PATIENCE))
        self.assertTrue(self.server.stop(base.PATIENCE))
        self.assertFalse(os.path.exists(self.path))

    def test_a_stop_lets_the_running_verbs_end(self):
        self.host.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            busy = pool.submit(self.client.host_info)
            self.host.wait_entered()
            self.assertFalse(self.server.stop(0.1))
            self.assertRaises(errors.AgentUnavailable, self.client.list)
            self.host.gate.set()
            self.assertEqual({'cpus': 2}, busy.result(base.PATIENCE))
        self.assertTrue(self.server.stop(base.PATIENCE))

    def test_a_directory_that_is_missing_is_an_error(self):
        self.assert_code('internal', server.AgentServer,
                         str(self.dir / 'a/b/c.sock'), self.host)

    def test_a_group_that_is_missing_is_an_error(self):
        error = self.assert_code(
            'invalid', server.AgentServer, str(self.dir / 'other'),
            self.host, 'nosuchgroup')
        self.assertIn('agent_group', error.remedy)


class TestUsers(base.AgentTestCase):
    """Other users than the agent's own; needs root to become them."""

    def setUp(self):
        super().setUp()
        if os.geteuid():
            self.skipTest('only root can become another user: run as root')
        if not shutil.which('setpriv'):
            self.skipTest('setpriv (util-linux) is not installed')
        self.server.stop(base.PATIENCE)
        # Any group that is nobody's own will do.
        self.group = grp.getgrnam('games')
        self.nobody = pwd.getpwnam('nobody')
        self.dir.chmod(0o755)
        self.served = self.serve(group=self.group.gr_name)

    def ask(self, *setpriv):
        """List the containers as another user; returns what it says."""
        root = pathlib.Path(client.__file__).parents[2]
        script = (
            'import sys\n'
            'sys.path.insert(0, sys.argv[1])\n'
            'from nova_pycontainer.agent import client\n'
            'from nova_pycontainer.runtime import errors\n'
            'try:\n'
            '    print(client.Client(sys.argv[2]).list())\n'
            'except errors.ContainerError as e:\n'
            '    print(e.code, e)\n')
        done = subprocess.run(
            ['setpriv', f'--reuid={self.nobody.pw_uid}', *setpriv,
             self.python(), '-c', script, str(root), self.path],
            capture_output=True, text=True, timeout=base.PATIENCE)
        self.assertEqual('', done.stderr)
        return done.stdout.strip()

    def python(self):
        # One that others may execute too, rather than one in a home.
        system = '/usr/bin/python3'
        return system if os.path.exists(system) else sys.executable

    def test_the_socket_is_roots_and_the_groups(self):
        found = os.stat(self.path)
        self.assertEqual(0o660, stat.S_IMODE(found.st_mode))
        self.assertEqual(
            (0, self.group.gr_gid), (found.st_uid, found.st_gid))

    def test_a_member_of_the_group_may(self):
        self.assertEqual('[]', self.ask(
            f'--regid={self.nobody.pw_gid}',
            f'--groups={self.group.gr_gid}'))
        self.assertEqual('[]', self.ask(
            f'--regid={self.group.gr_gid}', '--clear-groups'))

    def test_who_is_no_member_cannot_connect(self):
        said = self.ask(f'--regid={self.nobody.pw_gid}', '--clear-groups')
        self.assertIn('agent_unavailable', said)
        self.assertIn('Permission denied', said)
        self.assertIn('agent_group', said)

    def test_who_is_no_member_is_refused_whatever_the_sockets_mode(self):
        os.chmod(self.path, 0o666)
        said = self.ask(f'--regid={self.nobody.pw_gid}', '--clear-groups')
        self.assertIn('forbidden', said)
        self.assertIn(f'user {self.nobody.pw_uid}', said)

    def test_without_a_group_only_root_may(self):
        self.served.stop(base.PATIENCE)
        self.serve()
        self.assertEqual(
            0o600, stat.S_IMODE(os.stat(self.path).st_mode))
        os.chmod(self.path, 0o666)
        self.assertIn('forbidden', self.ask(
            f'--regid={self.group.gr_gid}', '--clear-groups'))
        self.assertEqual([], self.client.list())
