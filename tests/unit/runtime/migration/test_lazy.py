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


"""What is made of the end of the daemon for pages.

Here a script plays CRIU; ``test_faults.test_post_copy`` has the real one.
"""

import pathlib
import socket
import subprocess
import types

import fixtures

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import lazy
from tests import cases

_ERROR = '(00.100000) Error (criu/page-xfer.c:1534): {}: Connection reset'


class _Criu:
    """Runs a script as its guardian would run the daemon."""

    def __init__(self, script):
        self._script = script

    def spawn(self, arguments, fds, guard):
        del arguments, fds
        self.process = subprocess.Popen(
            [*guard, 'sh', '-c', self._script], start_new_session=True)
        return self.process.pid


class TestDaemon(cases.TestCase):

    def daemon(self, end):
        top = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        images = top / 'images'
        images.mkdir()
        self.kill = top / 'cgroup.kill'
        log = _ERROR.format("The page server doesn't answer")
        script = (f'cd {images}; echo "{log}" >lazy-pages.log; '
                  f'touch lazy-pages.socket; {end}')
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        criu = _Criu(script)
        daemon = lazy.Daemon(
            criu, images, ours, types.SimpleNamespace(v2=top))
        self.addCleanup(criu.process.wait)
        self.addCleanup(daemon.close)
        return daemon

    def test_all_has_come_and_the_source_was_gone_first(self):
        daemon = self.daemon('exit 0')
        daemon.wait(30)
        self.assertFalse(daemon.failed())
        self.assertFalse(self.kill.exists())

    def test_something_is_missing(self):
        daemon = self.daemon('exit 1')
        error = self.assertRaises(errors.ContainerError, daemon.wait, 30)
        self.assertEqual('lost', error.code)
        self.assertIn("The page server doesn't answer", str(error))
        self.assertTrue(daemon.failed())
        self.assertEqual('1\n', self.kill.read_text())

    def test_killed(self):
        daemon = self.daemon('kill -9 $$')
        error = self.assertRaises(errors.ContainerError, daemon.wait, 30)
        self.assertEqual('lost', error.code)
        self.assertEqual('1\n', self.kill.read_text())

    def test_not_in_time(self):
        daemon = self.daemon('exec sleep 100')
        error = self.assertRaises(errors.ContainerError, daemon.wait, 0.1)
        self.assertEqual('lost', error.code)
