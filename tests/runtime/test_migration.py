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

"""Live migration between two hosts, by the runtime alone."""

from tests.runtime import hosts


class MigrationTestCase(hosts.TwoHostsTestCase):

    def test_busybox_there_and_back(self):
        uuid = self.run_container(address='203.0.113.10')
        self.sh(self.a, uuid, 'echo kept > /root/file; echo x > /run/memory; '
                'setsid tail -f /etc/inittab </dev/null >/dev/null 2>&1 &')
        here, there = self.a, self.b
        for _ in range(2):
            self.migrate(uuid, here, there)
            here, there = there, here
            self.assertEqual('running', here.info(uuid)['state'])
            self.assertEqual([], there.list())
            self.assertEqual('kept', self.sh(here, uuid, 'cat /root/file'))
            self.assertEqual('x', self.sh(here, uuid, 'cat /run/memory'))
            self.sh(here, uuid, 'ps | grep -q "[t]ail -f"')
