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

"""Hosts between which a guest cannot move: known before it is touched."""

import uuid as uuidlib

from nova_pycontainer.runtime import errors
from tests.runtime import base
from tests.runtime import hosts

#: Makes an agent one of another release, in so far as others can tell.
OTHER_RELEASE = '''
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import protocol
protocol.VERSION = {protocol}
channel.VERSION = {channel}
'''


class RefusalsTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        for host in (self.a, self.b):
            host.run('hostname', f'host-{host.name}')
        self.record = self.top / 'points'
        self.a.record = self.record
        self.restart(self.a)

    def restart(self, host, **versions):
        host.stop_agent()
        if versions:
            directory = self.top / f'release-{host.name}'
            directory.mkdir(exist_ok=True)
            (directory / 'sitecustomize.py').write_text(
                OTHER_RELEASE.format(**{
                    'protocol': 1, 'channel': 1, **versions}))
            host.env['PYTHONPATH'] = f'{directory}:{base.ROOT}'
        host.start_agent()

    def check(self, uuid):
        facts = self.a.migration_check_source(uuid)['facts']
        return self.b.migration_check_destination(facts)['problems']

    def assert_untouched(self, uuid, *there):
        """It runs on, was never frozen, and nothing is left there."""
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.sh(self.a, uuid, 'true')
        if self.record.exists():
            self.assertNotIn('source.frozen', self.record.read_text())
        instances = self.b.directory / 'state/instances'
        base.wait_for(
            lambda: [info['uuid'] for info in self.b.list()] == [*there] ==
            [path.name for path in instances.iterdir()], 'the clean-up')

    # Its ids

    def test_range_of_ids_is_taken(self):
        uuid = self.run_container()
        info = self.a.info(uuid)
        other = str(uuidlib.uuid4())
        self.b.define(other, {**self.spec(), 'base_id': info['base_id']})
        problem, = self.check(uuid)
        print(problem)
        self.assertEqual('id-range', problem['name'])
        self.assertIn(str(info['base_id']), problem['reason'])
        self.assertIn(other, problem['reason'])
        self.assertIn('another host', problem['remedy'])
        # Taken between the check and the preparation.
        error = self.assertRaises(
            errors.ContainerError, self.prepare_migration, uuid, self.a,
            self.b)
        self.assertEqual('no_base_id', error.code)
        self.assert_untouched(uuid, other)
        self.b.delete(other)
        self.assertEqual([], self.check(uuid))
        self.migrate(uuid, self.a, self.b)
        self.assertEqual(info['base_id'], self.b.info(uuid)['base_id'])

    # Their protocol

    def assert_older(self, uuid, older):
        problem, = self.check(uuid)
        print(problem)
        self.assertEqual('protocol', problem['name'])
        self.assertIn('host-a speaks version', problem['reason'])
        self.assertIn('host-b speaks version', problem['reason'])
        self.assertIn(f'Upgrade nova-pycontainer on {older}',
                      problem['remedy'])
        # Whoever did not ask before is refused all the same.
        error = self.assertRaises(
            errors.ContainerError, self.prepare_migration, uuid, self.a,
            self.b)
        self.assertEqual('unsupported', error.code)
        self.assertIn(f'Upgrade nova-pycontainer on {older}', error.remedy)
        error = self.assertRaises(
            errors.ContainerError, self.a.migration_begin, uuid,
            str(uuidlib.uuid4()), self.b.host_info()['migration'])
        self.assertEqual('unsupported', error.code)
        self.assertIn(f'Upgrade nova-pycontainer on {older}', error.remedy)
        self.assert_untouched(uuid)

    def test_older_source(self):
        self.restart(self.b, protocol=2)
        self.assert_older(self.run_container(), 'host-a')

    def test_older_destination(self):
        self.restart(self.a, protocol=2)
        self.assert_older(self.run_container(), 'host-b')

    def test_other_channel(self):
        """One that was upgraded after it had been asked."""
        for versions, older in (({'channel': 2}, 'host-a'),
                                ({'channel': 0}, 'the host that accepts')):
            self.restart(self.b, **versions)
            uuid = self.run_container()
            migration = self.prepare_migration(uuid, self.a, self.b)
            error = base.wait_for(
                lambda m=migration: self._ended(self.a, m), 'the end')[
                    'error']
            print(error)
            self.assertEqual('unsupported', error['code'])
            self.assertIn(f'Upgrade nova-pycontainer on {older}',
                          error['remedy'])
            self.b.migration_abort(migration, 'Nova rolls back')
            self.assert_untouched(uuid)
            self.a.delete(uuid)
