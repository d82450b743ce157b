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


"""Those that watch over a restore, with processes in place of CRIU's."""

import os
import pathlib
import subprocess
import types

import fixtures

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import guardian
from tests import cases
from tests.runtime import base


class _Tool:
    """Runs what the keeper would run."""

    def __init__(self):
        self.processes = []

    def run(self, argv, fds):
        process = subprocess.Popen(argv, stdin=fds[0], stdout=fds[1])
        self.processes.append(process)
        return process.pid


class GuardianTestCase(cases.TestCase):

    def setUp(self):
        super().setUp()
        self.top = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.tool = _Tool()
        self.guardian = guardian.Guardian(
            self.tool, types.SimpleNamespace(v2=self.top))
        self.addCleanup(self._end)
        (fd, theirs), = self.guardian.fds.items()
        self.assertGreaterEqual(fd, 10)
        self.criu = subprocess.Popen(
            ['sleep', 'infinity'], pass_fds=[theirs])
        self.addCleanup(self.criu.wait)
        self.addCleanup(self.criu.kill)
        self.guardian.given()

    def _end(self):
        self.guardian.close()
        for process in self.tool.processes:
            process.wait()

    def written(self, name):
        path = self.top / name
        return path.read_text() if path.exists() else None

    def wait_dead(self):
        base.wait_for(lambda: self.written('cgroup.kill'), 'its end')
        self.assertEqual('1\n', self.written('cgroup.freeze'))

    def test_all_goes_well(self):
        self.guardian.freeze()
        self.criu.kill()
        self.criu.wait()
        self.guardian.close()
        self.assertEqual('1', self.written('cgroup.freeze'))
        self.assertIsNone(self.written('cgroup.kill'))

    def test_given_up(self):
        """The agent is there, and ends it itself."""
        self.guardian.close()
        self.criu.kill()
        self.assertIsNone(self.written('cgroup.freeze'))

    def test_criu_dies(self):
        self.criu.kill()
        self.wait_dead()
        error = self.assertRaises(
            errors.ContainerError, self.guardian.freeze)
        self.assertEqual('criu_failed', error.code)

    def test_the_agent_dies(self):
        # Which is when the kernel closes what it has.
        for fd in self.guardian._ours:
            os.close(fd)
        self.guardian._ours = []
        self.wait_dead()
