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

"""nova-compute and the agent die; servers go on."""

from tests import cases
from tests.cloud import base
from tests.cloud import sessions

#: Ends what hangs; nothing is measured by it.
PATIENCE = 120.0


class CrashTest(base.CloudTestCase):

    def setUp(self):
        super().setUp()
        self.server = self.create_server('debian13', host='host1')
        self.address = self.floating_ip(self.server)
        self.wait_ssh(self.address, user='debian')
        self.session = sessions.Session(self.address)
        self.addCleanup(self.session.finish)
        self.assert_talks()

    def assert_talks(self):
        self.session.come()
        base.wait_for(self.session.come, PATIENCE, 'the session talks')

    def start(self, name):
        base.cloud_sh('start', name)

    def ssh_in(self, command):
        return self.ssh(self.address, command, user='debian')

    def wait(self, status):
        self.wait_server(self.server.id, status)

    def reboot_inside(self):
        """By itself, which makes new interfaces."""
        boot = self.container(self.server)['started_at']
        self.inside(self.server, 'systemctl reboot')
        base.wait_for(
            lambda: self.container(self.server)['started_at'] not in (
                None, boot), PATIENCE, 'the guest reboots')
        self.wait_ssh(self.address, user='debian')

    def assert_every_verb_works(self):
        compute = self.demo.compute
        pid = self.ssh_in('pidof systemd-networkd').strip()
        compute.pause_server(self.server.id)
        self.wait('PAUSED')
        compute.unpause_server(self.server.id)
        self.wait('ACTIVE')
        self.assert_talks()
        self.assertEqual('', self.session.finish())
        compute.suspend_server(self.server.id)
        self.wait('SUSPENDED')
        compute.resume_server(self.server.id)
        self.wait('ACTIVE')
        self.wait_ssh(self.address, user='debian')
        self.assertEqual(pid, self.ssh_in('pidof systemd-networkd').strip())
        compute.stop_server(self.server.id)
        self.wait('SHUTOFF')
        compute.start_server(self.server.id)
        self.wait('ACTIVE')
        self.wait_ssh(self.address, user='debian')
        self.reboot_inside()
        for kind in 'SOFT', 'HARD':
            compute.reboot_server(self.server.id, kind)
            self.wait('ACTIVE')
            self.wait_ssh(self.address, user='debian')
        self.delete_server(self.server.id)
        self.assertNotIn(self.server.id, self.containers('host1'))

    def test_nova_compute(self):
        self.kill('host1.nova-compute')
        self.assert_talks()
        self.ssh_in('echo while-nova-is-dead | sudo tee /dev/console')
        self.start('host1.nova-compute')
        base.wait_for(
            lambda: 'while-nova-is-dead' in self.console(self.server),
            PATIENCE, 'the console log')
        self.wait('ACTIVE')
        self.assert_talks()
        self.assert_every_verb_works()

    @cases.more
    def test_agent(self):
        self.kill('host1.agent')
        self.assert_talks()
        self.ssh_in('echo while-the-agent-is-dead | sudo tee /dev/console')
        server = self.admin.compute.get_server(self.server.id)
        self.assertEqual(('ACTIVE', 1), (server.status, server.power_state))
        self.start('host1.agent')
        base.wait_for(
            lambda: 'while-the-agent-is-dead' in self.console(self.server),
            PATIENCE, 'the console log')
        self.assert_talks()
        self.assert_every_verb_works()

    def test_guest_ends_while_the_agent_is_dead(self):
        self.kill('host1.agent')
        self.session.finish()
        # The session is cut off.
        self.assertRaises(base.CommandError, self.ssh_in,
                          'sudo systemctl poweroff; sleep 60')
        self.start('host1.agent')
        self.wait('SHUTOFF')
        # Halted, and not killed: power off in a PID namespace is SIGINT.
        self.assertEqual(2, self.container(self.server)['exit']['signal'])
        self.demo.compute.start_server(self.server.id)
        self.wait('ACTIVE')
        self.wait_ssh(self.address, user='debian')

    @cases.more
    def test_agent_absent(self):
        """The service says so, and no power state is made up."""
        self.kill('host1.agent')

        def reported():
            service, = self.admin.compute.services(
                host='host1', binary='nova-compute')
            return service if service.status == 'disabled' else None

        service = base.wait_for(reported, PATIENCE, 'the report')
        self.assertIn('Is pycontainer-agent running on this host?',
                      service.disabled_reason)
        server = self.admin.compute.get_server(self.server.id)
        self.assertEqual(('ACTIVE', 1), (server.status, server.power_state))
        # What needs the agent fails, and says why.
        self.demo.compute.pause_server(self.server.id)
        base.wait_for(self._why, PATIENCE, 'the failure')
        self.wait('ACTIVE')
        # New servers go to the other host.
        other = self.create_server('busybox', 'pyc.tiny')
        self.assertEqual('host2', self.host_of(other))
        self.start('host1.agent')
        base.wait_for(lambda: not reported(), PATIENCE, 'the return')
        self.assert_talks()
        self.assert_every_verb_works()

    def _why(self):
        """Whether the failed action names the agent."""
        for action in self.admin.compute.server_actions(self.server.id):
            if action.action == 'pause':
                events = self.admin.compute.get_server_action(
                    action.request_id, self.server.id).events
                return any('agent' in str(event.get('details') or '')
                           or event.get('result') == 'Error'
                           for event in events or ())
        return False
