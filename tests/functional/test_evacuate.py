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

"""A host is lost, and its servers are made anew on another one."""

from tests.functional import base


class EvacuateTest(base.TestCase):

    def _lose(self, host):
        """Its services are gone; what it runs, it may run still."""
        service = self.service(host)
        self.computes[host].stop()
        self.admin_api.put_service(service['id'], {'forced_down': True})

    def _return(self, host):
        self.computes[host] = self.start_service('compute', host=host)
        # Nova lets it up again when it has seen to what was evacuated.
        self.admin_api.put_service(
            self.service(host)['id'], {'forced_down': False})

    def _evacuate(self, server, status):
        self.admin_api.post_server_action(server['id'], {'evacuate': {}})
        return self.wait_for(
            lambda: self._at(server, 'host2', status), 'the evacuation')

    def _at(self, server, host, status):
        server = self._settled(server, status)
        return (server if server and
                server['OS-EXT-SRV-ATTR:host'] == host else None)

    def setUp(self):
        super().setUp()
        self.admin_api.microversion = '2.95'

    def test_host_that_comes_back(self):
        server = self.boot()
        other = self.boot()
        self._lose('host1')
        self._evacuate(server, 'SHUTOFF')
        self.action(server, 'ACTIVE', 'os-start')
        self.assertEqual('running', self.info(server, 'host2')['state'])
        # Two of them, for nobody could reach the first host. It destroys
        # its own before it does anything else.
        self.assertEqual('running', self.info(server, 'host1')['state'])
        self._return('host1')
        self.wait_for(
            lambda: [other['id']] == [
                info['uuid'] for info in self.agents.client('host1').list()],
            'the end of the stale copy')
        self.assertEqual('running', self.info(server, 'host2')['state'])
        self.assertEqual('running', self.info(other, 'host1')['state'])
        for one in server, other:
            self.delete(one)
        for host in base.HOSTS:
            self.assert_nothing_left(host)

    def test_host_that_has_booted(self):
        """Its containers are down, and none of an evacuated one starts."""
        self.flags(resume_guests_state_on_host_boot=True)
        server = self.boot()
        self._lose('host1')
        self.agents.power_off_inside('host1', server['id'])
        self._evacuate(server, 'SHUTOFF')
        self._return('host1')
        self.wait_for(
            lambda: not self.agents.client('host1').list(), 'the clean-up')
        self.delete(server)
        self.assert_nothing_left('host2')
