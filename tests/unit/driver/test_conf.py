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

from oslo_config import cfg
import testtools

from nova_pycontainer.agent import options as agent_options
from nova_pycontainer import conf


class ConfTestCase(testtools.TestCase):

    def setUp(self):
        super().setUp()
        self.conf = cfg.ConfigOpts()
        conf.register(self.conf)
        self.conf([])

    def test_defaults(self):
        self.assertEqual('/run/pycontainer/agent.sock',
                         self.conf.pycontainer.agent_socket)
        self.assertEqual('auto', self.conf.pycontainer.tx_offload)

    def test_register_twice(self):
        conf.register(self.conf)

    def test_bad_values_are_refused(self):
        for name, value in (('tx_offload', 'maybe'), ('pids_max', 1),
                            ('agent_timeout', 0),
                            ('image_import_timeout', 0)):
            self.assertRaises(
                ValueError, self.conf.set_override, name, value,
                group='pycontainer')

    def test_every_option_is_listed_and_described(self):
        # The agent's are of the same group; whether they are registered too
        # depends on the tests before.
        listed = {
            option.dest: option for _group, options in (
                *conf.list_opts(), *agent_options.list_opts())
            for option in options}
        for name in self.conf.pycontainer:
            self.assertIn(name, listed)
            self.assertTrue(listed[name].help, name)
