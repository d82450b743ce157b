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

"""The leak check itself: what it must see and what it must not name."""

import os
import subprocess
import tempfile
import unittest
import uuid

from tests import leaks

#: Starts a process that outlives its starter and so has a new parent.
_ORPHAN = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, '-c', 'import sys; sys.stdin.read()', sys.argv[1]],
    stdin=int(sys.argv[2]), stdout=subprocess.DEVNULL,
    start_new_session=True)
print(child.pid)
"""


class TestLeaks(unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.marker = uuid.uuid4().hex

    def _orphan(self):
        """An orphaned process with the marker in its command.

        It ends when the returned descriptor is closed.
        """
        read, write = os.pipe()
        subprocess.run(
            ['python3', '-c', _ORPHAN, self.marker, str(read)],
            check=True, pass_fds=(read,), stdout=subprocess.PIPE, timeout=30)
        os.close(read)
        return write

    def test_process_that_outlives_its_starter(self):
        before = leaks.take()
        held = self._orphan()
        try:
            left = leaks.compare(before, leaks.take(), self.marker)
        finally:
            os.close(held)
        self.assertEqual(1, len(left), left)
        self.assertTrue(left[0].startswith('process: '), left)
        self.assertEqual(
            [], leaks.settled(before, marker=self.marker))

    def test_other_marker_is_not_named(self):
        before = leaks.take()
        held = self._orphan()
        try:
            left = leaks.compare(before, leaks.take(), uuid.uuid4().hex)
        finally:
            os.close(held)
        self.assertEqual([], left)

    def test_child_of_an_earlier_process_is_excused(self):
        process = leaks.Process(
            pid=30, start=3, parent=20, command='child', cgroup='/',
            namespaces={})
        daemon = leaks.Process(
            pid=20, start=2, parent=1, command='daemon', cgroup='/',
            namespaces={})
        before = leaks.Snapshot({}, {20: daemon}, own=[])
        now = leaks.Snapshot({}, {20: daemon, 30: process}, own=[])
        self.assertEqual([], leaks.compare(before, now))
        # The same pid, but another process.
        replaced = leaks.Snapshot(
            {}, {20: daemon.__class__(**{**vars(daemon), 'start': 1})},
            own=[])
        self.assertEqual(2, len(leaks.compare(replaced, now)))

    def test_what_tests_own_ancestors_adopt_is_not_excused(self):
        runner = leaks.Process(
            pid=20, start=2, parent=1, command='runner', cgroup='/',
            namespaces={'net': 'net:[1]'})
        orphan = leaks.Process(
            pid=30, start=3, parent=20, command='orphan', cgroup='/',
            namespaces={'net': 'net:[2]'})
        before = leaks.Snapshot({}, {20: runner}, own=[20])
        now = leaks.Snapshot({}, {20: runner, 30: orphan}, own=[20])
        self.assertEqual(
            ['process: 30 orphan (in its own net namespace)'],
            leaks.compare(before, now))

    def test_file_and_json(self):
        before = leaks.Snapshot.from_json(leaks.take().to_json())
        with tempfile.NamedTemporaryFile(
                prefix=f'pycontainer-{self.marker}', dir='/tmp') as left:
            self.assertEqual(
                [f'file: {left.name}'],
                leaks.compare(before, leaks.take(), self.marker))

    def test_fixture(self):
        check = leaks.LeakCheck(marker=self.marker, timeout=0)
        check.setUp()
        held = self._orphan()
        try:
            with self.assertRaises(leaks.LeakError):
                check.cleanUp()
        finally:
            os.close(held)
        with leaks.LeakCheck(marker=self.marker):
            pass
