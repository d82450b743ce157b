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

"""Former releases are replaced by this one.

What they have written is read, with guests that they have started; a selection
of ``python -m tests.faults.upgrade``.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import threading

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import state
from tests import cases
from tests.faults import kernel
from tests.faults import releases
from tests.faults import upgrade
from tests.faults import witness
from tests.runtime import base
from tests.runtime import hosts

_DATA = pathlib.Path(__file__).parent / 'data'


class FormerStateTestCase(base.HostTestCase):
    """``state.json`` as agents of former releases have really written it, one
    for each state that a container can be in.
    """

    disk_limit = 'loop'

    def _write(self, name, data):
        """Have a container as a former agent has left it."""
        layer = self.layer('busybox')
        data['spec']['layer'] = layer
        self.host.define(data['uuid'], {
            **data['spec'], 'base_id': data['base_id'], 'config_drive': None})
        if data['rescue']:
            data['rescue']['spec']['layer'] = layer
            self.host.rescues.begin(data['uuid'], data['rescue']['spec'])
        # Their hosts had another cgroup for containers.
        self._file(data['uuid']).write_text(re.sub(
            r'pyc-test-\d+-[ab]', self.cgroup_parent, json.dumps(data)))

    def _file(self, uuid):
        return self.config.instances_dir / uuid / 'state.json'

    def _restart(self):
        self.host.close()
        self.host = self.make_host()

    def _try(self, number):
        path = _DATA / f'state-format-{number}.json'
        states = json.loads(path.read_text())['states']
        for name, data in states.items():
            self.assertEqual(number, data['format'])
            self._write(name, data)
        self._restart()
        for name, data in states.items():
            uuid = data['uuid']
            info = self.host.info(uuid)
            self.assertEqual(
                # Its process has gone with its host.
                {'running': 'stopped', 'rescued': 'stopped',
                 'offered': 'stopped'}.get(name, name), info['state'])
            self.assertEqual(name == 'rescued', info['rescue'])
            self._use(name, uuid)
            self.assertEqual(state.FORMAT, json.loads(
                self._file(uuid).read_text())['format'])
            print(f'format {number}: {name} is used')
        # Once more, from what it is now.
        self._restart()
        for data in states.values():
            self.assertEqual('running', self.state(data['uuid']))

    def _use(self, name, uuid):
        if name == 'suspended':
            error = self.assert_code(
                'internal', self.host.checkpoints.resume, uuid)
            self.assertIn('checkpoint', error.message)
        if name == 'offered':
            self.assert_code('bad_state', self.host.prepare, uuid)
            self.host.transfers.withdraw(uuid)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertEqual('1', self.sh(uuid, 'echo 1 > /file; cat /file'))
        if name == 'rescued':
            self.host.stop(uuid, 30)
            self.host.rescues.end(uuid)
            self.host.prepare(uuid)
            self.host.start_container(uuid)
            self.sh(uuid, 'test ! -e /file')

    def test_format_1(self):
        self._try(1)

    def test_format_2(self):
        self._try(2)

    def test_format_3(self):
        self._try(3)

    def _put_back(self, file, data):
        if json.loads(file.read_text())['format'] != data['format']:
            file.write_text(json.dumps(data))
            self._restart()

    def test_later_format(self):
        """Its container is left alone, and the others have an agent."""
        uuid, other = self.run_container(), self.run_container()
        pid = self.host.info(uuid)['pid']
        file = self._file(uuid)
        data = json.loads(file.read_text())
        # Else nobody would know of it, and remove it.
        self.addCleanup(self._put_back, file, data)
        file.write_text(json.dumps(data | {'format': state.FORMAT + 1}))
        with self.assertLogs('nova_pycontainer.runtime.loading') as logs:
            self._restart()
        self.assertIn(f'has format {state.FORMAT + 1}, this release reads up '
                      f'to {state.FORMAT}', ''.join(logs.output))
        self.assert_code('not_found', self.host.info, uuid)
        self.assertEqual('running', self.state(other))
        # Nothing is made in its place.
        self.assert_code('exists', self.host.define, uuid, self.spec())
        self.assertTrue(os.path.exists(f'/proc/{pid}'))
        file.write_text(json.dumps(data))
        self._restart()
        self.assertEqual(('running', pid), (
            self.state(uuid), self.host.info(uuid)['pid']))


class RollingUpgradeTestCase(upgrade.Rolling):

    callers = 1

    def test_host_by_host(self):
        self.runTest()


class UpgradeInMigrationTestCase(upgrade.Rows):

    def _try(self, *rows):
        for step, name, outcome in rows:
            found = self.row('move', step, name)
            print(self.rev, step, name, found)
            self.assertIn(found, (outcome, f'{outcome}, connections cut'),
                          f'{step} {name}')
            # Whose restore this release has ended has its locks.
            self.assertEqual(
                outcome == 'destination' and 'b' not in name.split()[1],
                self.unlocked)

    @cases.more
    def test_source(self):
        self._try(('source.committed', 'kill a', 'destination'),
                  ('source.final-pass', 'stop a', 'source'))

    def test_destination(self):
        self._try(('destination.images', 'kill b', 'source'),
                  ('destination.committed', 'kill b', 'destination'))

    def test_both(self):
        self._try(('source.committed', 'kill a-b', 'destination'))


class UpgradeOfSuspendedTestCase(releases.Releases, hosts.TwoHostsTestCase):

    def _file(self, uuid):
        return self.a.directory / 'state/instances' / uuid / 'state.json'

    def _counting(self):
        uuid = self.run_container()
        seen = witness.Witness((self.a, self.b), uuid)
        self.addCleanup(seen.close)
        self.sh(self.a, uuid, witness.COUNT)
        base.wait_for(lambda: seen.last('a'), 'the guest to be busy')
        return uuid, seen

    def test_resume_that_let_it_run(self):
        """The former agent is killed between the guest's first instruction
        and the note that its checkpoint is of the past.
        """
        uuid, seen = self._counting()
        self.a.suspend(uuid)
        go = self.top / 'go'
        self.a.record = self.top / 'points'
        self.a.restart_agent(f'resume.adopted=wait:{go}')
        thread = threading.Thread(target=self._resume, args=(uuid,))
        thread.start()
        base.wait_for(
            lambda: self.a.record.exists() and 'resume.adopted' in
            self.a.record.read_text(), 'the restored guest')
        criu = kernel.programs(self.a, 'criu')
        self.assertTrue(criu)
        for pid in criu:
            os.kill(pid, signal.SIGSTOP)
        go.touch()
        base.wait_for(lambda: not kernel.Copy(self.a, uuid).frozen,
                      'the guest to be let go')
        self.a.kill_agent()
        thread.join()
        for pid in criu:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.assertTrue(seen.moves('a'))
        data = json.loads(self._file(uuid).read_text())
        self.assertEqual((3, 'restoring'), (
            data['format'], data['suspended']['phase']))
        lines = seen.last('a')
        self.a.faults = ''
        self.install(self.a)
        self.a.start_agent()
        self.assertTrue(self.is_new(self.a))
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.assertTrue(seen.moves('a'))
        self.assertGreater(seen.last('a'), lines)
        self.assertEqual([], seen.problems('a'))
        # And again, in this release.
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.assertTrue(seen.moves('a'))
        self.assertEqual([], seen.problems('a'))

    def _resume(self, uuid):
        with contextlib.suppress(errors.AgentUnavailable):
            self.a.resume(uuid)

    def test_going_back(self):
        """The former agent does not know what this one has written: it leaves
        it alone.
        """
        uuid, seen = self._counting()
        known, other = self._counting()
        self.upgrade(self.a)
        self.a.pause(uuid)
        self.a.unpause(uuid)
        # Written by this release.
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.downgrade(self.a)
        self.assertEqual([known], [c['uuid'] for c in self.a.list()])
        self.assertIn(
            f'has format {state.FORMAT}, this release reads up to 3',
            self.a.log.read_text())
        self.assertEqual([self.a.name], kernel.running((self.a,), uuid))
        self.upgrade(self.a)
        for guest, lines in (uuid, seen), (known, other):
            self.assertEqual('running', self.a.info(guest)['state'])
            self.assertTrue(lines.moves('a'))
            self.assertEqual([], lines.problems('a'))
