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

"""Threads that sleep, and what they may be called.

That their sleep goes on is what ``test_migration_clocks`` shows.
"""

import pathlib
import time
import types

from nova_pycontainer.runtime.migration import resume
from nova_pycontainer.runtime.migration import sleepers
from nova_pycontainer.runtime.migration import terminals
from tests.runtime import base
from tests.runtime import traced

#: Has a name that is not in UTF-8, and that looks like more lines.
_SLEEPS = '''
import ctypes, time
ctypes.CDLL(None).prctl(15, b"\\xff)\\rNSpid:\\t9")
print("ready", flush=True)
begin = time.monotonic()
time.sleep(2)
print(1.99 < time.monotonic() - begin, flush=True)
'''


class SleepersTestCase(traced.TracedTestCase):

    def setUp(self):
        super().setUp()
        self.process = self.begin(_SLEEPS)
        self.assertEqual('ready\n', self.process.stdout.readline())
        self.pid = self.process.pid
        base.wait_for(lambda: 'nanosleep' in pathlib.Path(
            f'/proc/{self.pid}/wchan').read_text(), 'it to sleep')
        self.group = types.SimpleNamespace(
            processes=lambda: [self.pid],
            threads=lambda: [f'/proc/{self.pid}/task/{self.pid}'])

    def test_name_of_any_bytes(self):
        found = sleepers.Sleepers(self.group)
        found.look()
        facts, = found.frozen(0)
        self.assertEqual(self.pid, facts['tid'])
        self.assertIsNotNone(facts['since'])
        self.assertEqual({}, terminals.sessions(self.group))
        resume.resume([resume.Sleep(*s) for s in found.stopped],
                      time.clock_gettime_ns(time.CLOCK_MONOTONIC), self.pid)
        self.assertEqual('True\n', self.process.stdout.readline())
