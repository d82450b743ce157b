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
import base64

import ddt

from nova_pycontainer import injection
from tests.unit.driver import base


@ddt.ddt
class InjectionTestCase(base.TestCase):

    def files(self, injected=(), config_drive='', vifs=None):
        return {
            item['path']: base64.b64decode(item['content'])
            for item in injection.files(
                self.make_instance(config_drive=config_drive), injected,
                vifs or [base.make_vif()])}

    def static(self):
        vif = base.make_vif()
        vif['network']['meta']['injected'] = True
        return [vif]

    def test_files_of_the_user(self):
        self.assertEqual(
            {'/etc/motd': b'hello', '/bin/x': b'\xff\0'},
            self.files([('/etc/motd', 'hello'), ('/bin/x', b'\xff\0')]))

    @ddt.data((), None)
    def test_none(self, injected):
        self.assertEqual({}, self.files(injected))

    def test_config_drive_has_them(self):
        self.assertEqual({}, self.files(
            [('/etc/motd', 'hello')], 'True', self.static()))

    def test_addresses(self):
        found = self.files(vifs=self.static())
        self.assertEqual(['/etc/network/interfaces'], [*found])
        text = found['/etc/network/interfaces'].decode()
        self.assertIn('iface eth0 inet static', text)
        self.assertIn('fa:16:3e:00:00:01', text)

    def test_the_users_own_addresses(self):
        mine = ('/etc/network/interfaces', 'mine')
        self.assertEqual(
            {mine[0]: b'mine'}, self.files([mine], vifs=self.static()))

    def test_no_template(self):
        self.flags(injected_network_template='')
        self.assertEqual({}, self.files(vifs=self.static()))
