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

"""Rescue of servers, through Nova's API."""

from tests import cases
from tests.functional import agents
from tests.functional import base


class RescueTest(base.TestCase):

    def setUp(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        super().setUp()
        self.other = self.make_image(
            self.image_data() + b'\0' * 1024,
            properties={'pycontainer_stop_signal': 'SIGUSR2'})

    def sh(self, server, script):
        done = self.agents.client('host1').exec(
            server['id'], ['/bin/sh', '-c', script])
        self.assertEqual(0, done['exit_code'], done['stderr'])
        return done['stdout'].decode().strip()

    def rescued(self, **values):
        """A server that is being rescued."""
        server = self.boot(**values)
        self.sh(server, 'echo own > /root/file; chown 7:8 /root/file; sync')
        self.action(server, 'RESCUE', 'rescue', {
            'rescue_image_ref': self.other, 'adminPass': 'secret'})
        return server

    def test_rescue_and_unrescue(self):
        server = self.boot()
        before = self.info(server)
        self.delete(server)
        server = self.rescued()
        now = self.api.get_server(server['id'])
        self.assertEqual(1, now['OS-EXT-STS:power_state'])
        info = self.info(server)
        self.assertEqual(('running', True, self.other), (
            info['state'], info['rescue'], info['image_id']))
        # The network is the server's own.
        self.assertEqual(1, len(info['nics']))
        self.assertEqual([info['nics'][0]['devname']], [*self.plugged])
        self.assertEqual(
            before['resources'] | {}, info['resources'])
        self.assertEqual('', self.sh(server, 'ls /root'))
        self.assertEqual('own 7 8', self.sh(
            server, 'echo $(cat /mnt/root/file) '
            '$(stat -c "%u %g" /mnt/root/file)'))
        self.sh(server, 'echo repaired > /mnt/root/file; touch /scratch')
        self.action(server, 'ACTIVE', 'unrescue')
        info = self.info(server)
        self.assertEqual(('running', False, self.image), (
            info['state'], info['rescue'], info['image_id']))
        self.assertEqual('repaired', self.sh(server, 'cat /root/file'))
        self.assertEqual('', self.sh(server, 'ls /scratch || true'))
        self.assertEqual([info['nics'][0]['devname']], [*self.plugged])
        self.delete(server)
        self.assert_nothing_left()

    @cases.more
    def test_of_a_server_that_is_off(self):
        server = self.boot()
        self.sh(server, 'echo own > /root/file; sync')
        self.action(server, 'SHUTOFF', 'os-stop')
        # Without an image: the server's own.
        self.action(server, 'RESCUE', 'rescue', {})
        self.assertEqual('own', self.sh(server, 'cat /mnt/root/file'))
        self.action(server, 'ACTIVE', 'unrescue')
        self.assertEqual('own', self.sh(server, 'cat /root/file'))

    @cases.more
    def test_destroy(self):
        server = self.rescued()
        self.delete(server)
        self.assert_nothing_left()

    @cases.more
    def test_restarts_in_between(self):
        server = self.rescued()
        self.agents.stop('host1')
        self.agents.start('host1')
        self.restart()
        self.assertEqual('RESCUE', self.api.get_server(
            server['id'])['status'])
        self.periodic('_sync_power_states')
        self.assertEqual('own', self.sh(server, 'cat /mnt/root/file'))
        self.action(server, 'ACTIVE', 'unrescue')
        self.assertEqual('own', self.sh(server, 'cat /root/file'))

    def test_host_boots(self):
        self.flags(resume_guests_state_on_host_boot=True)
        server = self.rescued()
        self.computes['host1'].stop()
        # After a boot of the host no container lives and no interface is
        # there.
        self.agents.power_off_inside('host1', server['id'])
        self.plugged.clear()
        self.computes['host1'] = self.start_service('compute', host='host1')
        self.wait_for(lambda: self.info(server)['state'] == 'running',
                      'the resume')
        self.assertEqual('own', self.sh(server, 'cat /mnt/root/file'))
        self.action(server, 'ACTIVE', 'unrescue')
        self.assertEqual('own', self.sh(server, 'cat /root/file'))

    @cases.more
    def test_image_that_cannot_be_started(self):
        server = self.boot()
        self.sh(server, 'echo own > /root/file; sync')
        image = self.make_image(base.tarball('etc/nothing'))
        self.api.post_server_action(server['id'], {'rescue': {
            'rescue_image_ref': image}})
        server = self.wait(server, 'ERROR')
        self.assertIn('cannot be rescued', server['fault']['message'])
        # Its own root is as it was.
        self.api.post_server_action(
            server['id'], {'os-resetState': {'state': 'active'}})
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assertEqual('own', self.sh(server, 'cat /root/file'))
        self.assertFalse(self.info(server)['rescue'])
