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

"""Cold migration between two agents, one of which fails at each step."""

import itertools
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from tests.runtime import base
from tests.runtime import hosts

SOURCE = ('offer.mounted', 'offer.serving')
DESTINATION = ('taking.connected', 'taking.files', 'taking.written')


class TransferTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        self.uuid = self.run_container(config_drive={'file': 'e30='})
        self.sh(self.a, self.uuid,
                'mkdir /d; echo kept > /d/file; ln /d/file /d/link; '
                'rm /etc/init.d/rcS; echo seen > /dev/console; sync')
        base.wait_for(lambda: b'seen' in self.a.console_log(self.uuid),
                      'the console')
        self.a.kill(self.uuid)
        self.migration = str(uuidlib.uuid4())

    def offer(self):
        return self.a.transfer_offer(
            self.uuid, self.migration, self.b.host_info()['migration'])

    def take(self, facts):
        self.b.transfer_take(
            self.uuid, self.migration, facts['spec'], facts)
        return self.end()

    def end(self):
        return base.wait_for(self.ended, 'the end')

    def ended(self):
        try:
            status = self.b.migration_status(self.migration, 1.0)
        except errors.AgentUnavailable:
            return {'phase': 'killed'}
        return status if status['ended_at'] else None

    def completed(self, status):
        self.assertEqual(
            'completed', status['phase'], f'{status["error"]}\n{self.logs()}')

    def refused(self, host, said):
        error = self.assertRaises(
            errors.ContainerError, host.prepare, self.uuid)
        self.assertEqual('bad_state', error.code)
        self.assertIn(said, str(error))

    def assert_whole(self, host):
        """It has all of its files there, and starts."""
        self.assertIn(b'seen', host.console_log(self.uuid))
        host.prepare(self.uuid)
        host.start_container(self.uuid)
        self.assertEqual('kept 2', self.sh(
            host, self.uuid, 'echo $(cat /d/link) $(stat -c %h /d/link)'))
        self.assertEqual('{}', self.sh(
            host, self.uuid, 'cat /config-drive/file'))
        self.assertEqual('gone', self.sh(
            host, self.uuid, 'test -e /etc/init.d/rcS || echo gone'))

    def assert_nothing(self, host):
        self.assertEqual([], host.list())
        self.assertNotIn(self.uuid, host.run('cat', '/proc/mounts').stdout)

    def test_taken(self):
        facts = self.offer()
        self.refused(self.a, 'moved to another host')
        self.completed(self.take(facts))
        self.assertEqual(self.a.info(self.uuid)['base_id'],
                         self.b.info(self.uuid)['base_id'])
        self.assert_whole(self.b)
        self.assertEqual(self.migration, self.b.info(self.uuid)['arrived'])
        self.refused(self.a, 'moved to another host')
        self.a.delete(self.uuid)
        self.assert_nothing(self.a)

    def test_withdrawn(self):
        facts = self.offer()
        self.a.transfer_withdraw(self.uuid)
        self.assertEqual('failed', self.take(facts)['phase'])
        self.refused(self.b, 'not all come')
        # Another root would get what is still to come; an image of what is
        # here would pass for one of the server.
        spec = facts['spec']
        for use in (lambda: self.b.rescue(self.uuid, {
                        name: spec[name] for name in
                        ('layer', 'image_id', 'init') if name in spec}),
                    lambda: self.b.snapshot(self.uuid).read()):
            error = self.assertRaises(errors.ContainerError, use)
            self.assertIn('not all come', str(error))
        self.b.delete(self.uuid)
        self.assert_nothing(self.b)
        self.a.transfer_withdraw(self.uuid)
        self.assert_whole(self.a)

    def test_only_one_host_may_have_it(self):
        facts = self.offer()
        self.a.transfer_withdraw(self.uuid)
        self.a.transfer_offer(
            self.uuid, self.migration, self.a.host_info()['migration'])
        status = self.take(facts)
        self.assertEqual('failed', status['phase'])
        self.assertEqual('forbidden', status['error']['code'])

    def test_described_again(self):
        facts = self.offer()
        source = self.a.host_info()['migration']
        for _again in range(2):
            told = self.b.transfer_describe(
                self.uuid, self.migration, source)
            self.assertEqual(facts, told)
        self.a.restart_agent()
        told = self.b.transfer_describe(self.uuid, self.migration, source)
        self.completed(self.take(told))
        self.assert_whole(self.b)

    def test_not_described_to_others(self):
        source = self.a.host_info()['migration']
        self.assertRaises(
            errors.ContainerError, self.b.transfer_describe, self.uuid,
            self.migration, source)
        self.a.transfer_offer(self.uuid, self.migration, source)
        error = self.assertRaises(
            errors.ContainerError, self.b.transfer_describe, self.uuid,
            self.migration, source)
        self.assertEqual('forbidden', error.code)

    def test_of_one_that_runs(self):
        self.a.prepare(self.uuid)
        self.a.start_container(self.uuid)
        error = self.assertRaises(errors.ContainerError, self.offer)
        self.assertEqual('bad_state', error.code)

    def test_each_step_fails(self):
        for host, points in ((self.a, SOURCE), (self.b, DESTINATION)):
            for point, what in itertools.product(points, ('raise', 'kill')):
                host.restart_agent(f'{point}={what}')
                facts = self.offer()
                status = self.take(facts)
                print(point, what, status['phase'])
                self.assertNotEqual('completed', status['phase'])
                if what == 'kill':
                    host.process.wait(base.PATIENCE)
                    host.restart_agent()
                self.refused(self.b, 'not all come')
                self.refused(self.a, 'moved to another host')
                self.b.transfer_resume(self.uuid)
                self.completed(self.end())
                self.assert_whole(self.b)
                self.b.delete(self.uuid)
                self.assert_nothing(self.b)
                self.a.transfer_withdraw(self.uuid)
        self.assert_whole(self.a)
