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

"""The end of CRIU's process, and of what it leaves when it is killed."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from unittest import mock

import fixtures

from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import process
from tests import cases


class SessionTestCase(cases.TestCase):

    def setUp(self):
        super().setUp()
        # Who is to be killed is known by the file that it executes.
        self.program = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path, 'criu')
        shutil.copy('/bin/sleep', self.program)
        self.leader = subprocess.Popen(
            ['/bin/sh', '-c', f'{self.program} 1000 & echo $!; sleep 1000 & '
             f'echo $!; exec {self.program} 1000'],
            start_new_session=True, stdout=subprocess.PIPE, text=True)
        self.addCleanup(self.leader.stdout.close)
        self.children = []
        for name in (self.program.name, 'sleep'):
            pid = int(self.leader.stdout.readline())
            # The shell tells it before the child executes its program.
            while pathlib.Path(f'/proc/{pid}/comm').read_text() != f'{name}\n':
                time.sleep(0.01)
            pidfd = process.pidfd_open(pid)
            self.addCleanup(os.close, pidfd)
            self.addCleanup(process.send_signal, pidfd, signal.SIGKILL)
            self.children.append(pidfd)
        self.addCleanup(self.leader.wait)
        self.addCleanup(self.leader.kill)
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)
        self.session = criu.Session(None, ours, self.leader.pid)

    def test_killed(self):
        self.session.kill()
        rpc = mock.Mock()
        rpc.criu_req.return_value.SerializeToString.return_value = b'dump'
        self.session._rpc = rpc
        # As it is used, also where nobody passes the error on.
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.session)
            self.assertRaises(
                errors.ContainerError, self.session.request, 1, None, print,
                10)
        own, others = self.children
        self.assertTrue(process.exited(own, 10))
        self.assertFalse(process.exited(others))

    def test_a_good_end(self):
        """What was restored may be of CRIU's session still."""
        with self.session:
            self.session.kill()
        for pidfd in self.children:
            self.assertFalse(process.exited(pidfd, 0.2))
