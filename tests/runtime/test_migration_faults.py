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

"""Never twice, never lost: an agent that dies, or fails, at each point.

What is asserted is read from the kernel: a guest's processes, by a counter
that only a running guest moves.
"""

import pathlib
import signal
import subprocess
import time

from nova_pycontainer.runtime import errors
from tests import cases
from tests.runtime import base
from tests.runtime import hosts

#: Only a running guest moves it; one that ran twice would leave two files.
COUNTER = ('setsid sh -c "i=0; while :; do i=\\$((i+1)); echo \\$i > /count; '
           'sleep 0.05; done" </dev/null >/dev/null 2>&1 &')

SOURCE_BEFORE = (
    'source.connected', 'source.pass', 'source.frozen', 'source.final-pass',
    'source.dumped', 'source.ready')
SOURCE_AFTER = ('source.committed', 'source.go', 'source.running')
DESTINATION_BEFORE = (
    'destination.prepared', 'destination.pass', 'destination.images',
    'destination.rebuilt', 'destination.restored', 'destination.ready')
DESTINATION_AFTER = (
    'destination.go', 'destination.committed', 'destination.resumed',
    'destination.running')


class Helpers(hosts.TwoHostsTestCase):

    def _boot(self):
        uuid = self.run_container(address='203.0.113.10')
        self.sh(self.a, uuid, COUNTER)
        return uuid

    def _count(self, host, uuid):
        path = host.directory / 'state/instances' / uuid / 'disk/upper/count'
        done = host.run('cat', str(path), check=False, stderr=-3)
        return int(done.stdout.strip() or 0) if not done.returncode else None

    def _runs(self, host, uuid):
        """Whether the guest runs on a host, by what it does."""
        before = self._count(host, uuid)
        if before is None:
            return False
        for _ in range(10):
            time.sleep(0.1)
            if self._count(host, uuid) != before:
                return True
        return False

    def _where(self, uuid):
        return [h.name for h in (self.a, self.b) if self._runs(h, uuid)]

    def _try(self, uuid):
        """Begin a migration, whatever becomes of it."""
        try:
            migration = self.prepare_migration(uuid, self.a, self.b)
            self.outcome = self.a.migration_status(migration, 10.0)
            return migration
        except errors.ContainerError:
            return None

    def _died(self, host):
        try:
            code = host.process.wait(base.PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f'{host.name} lives: {self.outcome}\n{self.logs()}') from None
        self.assertEqual(-signal.SIGKILL, code)

    def _settled(self, uuid, expected):
        base.wait_for(lambda: self._where(uuid) == expected,
                      f'{uuid} to run on {expected} only')
        time.sleep(1)
        for host in (self.a, self.b):
            if host.name in expected:
                # One that is not seen to move may only be slow.
                base.wait_for(lambda h=host: self._runs(h, uuid),
                              f'{uuid} to run on {host.name}')
            else:
                self.assertFalse(self._runs(host, uuid), host.name)
        self.sh(self.a if expected == ['a'] else self.b, uuid, 'true')

    def _check_clean(self, host, uuid):
        def infos():
            return [i for i in host.list() if i['state'] != 'stopped']

        try:
            base.wait_for(lambda: not infos(), f'{host.name} to be empty')
        except AssertionError as e:
            raise AssertionError(f'{e}: {infos()}\n{self.logs()}') from None
        for line in host.run('cat', '/proc/mounts').stdout.splitlines():
            self.assertNotIn('pycontainer-images', line)


class FaultsTestCase(Helpers):

    # One agent dies; it comes back.

    def _kill_source(self, point):
        self.a.restart_agent(f'{point}=kill')
        uuid = self._boot()
        self._try(uuid)
        self._died(self.a)
        # At most one, whatever is the case.
        self.assertLessEqual(len(self._where(uuid)), 1)
        self.a.restart_agent()
        return uuid

    def test_source_dies_before_its_commit(self):
        for point in cases.some(SOURCE_BEFORE, 1, -1):
            uuid = self._kill_source(point)
            self._settled(uuid, ['a'])
            self._check_clean(self.b, uuid)
            self.migrate(uuid, self.a, self.b)
            self._settled(uuid, ['b'])
            self.b.delete(uuid)

    def test_source_dies_after_its_commit(self):
        for point in SOURCE_AFTER:
            uuid = self._kill_source(point)
            self._settled(uuid, ['b'])
            base.wait_for(
                lambda: self.a.info(uuid)['state'] == 'stopped',  # noqa: B023
                'the source to know')
            error = self.assertRaises(
                errors.ContainerError, self.a.prepare, uuid)
            self.assertEqual('bad_state', error.code)
            self.a.delete(uuid)
            self.b.delete(uuid)

    def _kill_destination(self, point):
        self.b.restart_agent(f'{point}=kill')
        uuid = self._boot()
        self._try(uuid)
        self._died(self.b)
        self.assertLessEqual(len(self._where(uuid)), 1)
        self.b.restart_agent()
        return uuid

    def test_destination_dies_before_the_commit(self):
        for point in cases.some(DESTINATION_BEFORE, 2, -1):
            uuid = self._kill_destination(point)
            self._settled(uuid, ['a'])
            for info in self.b.list():
                # What waits for the source goes with Nova's roll-back.
                self.b.migration_abort(info['migration'], 'rolled back')
            self._check_clean(self.b, uuid)
            self.migrate(uuid, self.a, self.b)
            self.b.delete(uuid)

    def test_destination_dies_after_the_commit(self):
        for point in cases.some(DESTINATION_AFTER, 1, 2):
            uuid = self._kill_destination(point)
            self._settled(uuid, ['b'])
            base.wait_for(
                lambda: self.a.info(uuid)['state'] == 'stopped',  # noqa: B023
                'the source to know')
            self.a.delete(uuid)
            self.b.delete(uuid)

    # Nobody dies, something fails.

    def test_failures_before_the_commit(self):
        for host, points in (
                (self.a, cases.some(SOURCE_BEFORE, 2, -1)),
                (self.b, cases.some(DESTINATION_BEFORE, 0, 3))):
            for point in points:
                host.restart_agent(f'{point}=raise')
                uuid = self._boot()
                migration = self._try(uuid)
                status = base.wait_for(
                    lambda: self._ended(self.a, migration),  # noqa: B023
                    f'the end after {point}')
                self.assertEqual('failed', status['phase'], point)
                self.assertIn('injected', str(status['error']), point)
                self._settled(uuid, ['a'])
                self._check_clean(self.b, uuid)
                self.a.delete(uuid)
            host.restart_agent()

    def test_abort_while_copying_and_delete_while_migrating(self):
        self.a.restart_agent('source.pass=sleep:3')
        uuid = self._boot()
        migration = self.prepare_migration(uuid, self.a, self.b)
        self.a.migration_abort(migration, 'changed my mind')
        self.assertEqual(
            'aborted', self.a.migration_status(migration)['phase'])
        self._settled(uuid, ['a'])
        self._check_clean(self.b, uuid)
        self.a.restart_agent('source.pass=sleep:3')
        self.prepare_migration(uuid, self.a, self.b)
        self.a.delete(uuid)
        self.assertEqual([], self.a.list())
        self._check_clean(self.b, uuid)
        self.assertEqual([], self._where(uuid))

    def test_all_points_are_covered(self):
        record = pathlib.Path(self.top / 'points')
        for host in (self.a, self.b):
            host.record = record
            host.restart_agent()
        uuid = self._boot()
        record.unlink()
        self.migrate(uuid, self.a, self.b)
        points = {p for p in record.read_text().split()
                  if p.startswith(('source.', 'destination.'))}
        # "asked" is between "ready" and "go": the source decides it.
        self.assertEqual(points, {
            *SOURCE_BEFORE, *SOURCE_AFTER, *DESTINATION_BEFORE,
            *DESTINATION_AFTER, 'destination.asked'})
