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

"""Ordinary processes, for tests of what is done to those of a guest."""

import pathlib
import subprocess
import sys

from nova_pycontainer.runtime.migration import tracer
from tests import cases

#: In a PID namespace of its own, as a guest: its child is 1 there.
GUEST = ('unshare', '--pid', '--fork', '--kill-child')


class TracedTestCase(cases.TestCase):

    def setUp(self):
        super().setUp()
        if not tracer.supported():
            self.skipTest('no processes can be traced on this architecture')

    def begin(self, code, *arguments, by=()):
        """Begin a Python program.

        :param by: the command that begins it
        """
        process = subprocess.Popen(
            [*by, sys.executable, '-c', code, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    @staticmethod
    def children(pid):
        return [int(child) for child in pathlib.Path(
            f'/proc/{pid}/task/{pid}/children').read_text().split()]
