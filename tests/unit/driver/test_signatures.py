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

"""The driver's methods against those of the Nova that is installed.

Nova calls most of them by position and adds parameters from release to
release; a driver that does not follow raises TypeError in the middle of an
operation.
"""

import inspect

from nova.virt import driver as nova_driver
import testtools

from nova_pycontainer import driver


class SignatureTestCase(testtools.TestCase):

    def test_overridden_methods(self):
        base = nova_driver.ComputeDriver
        compared = []
        for name, method in vars(driver.PyContainerDriver).items():
            theirs = getattr(base, name, None)
            if not inspect.isfunction(method) or theirs is None:
                continue
            if name.startswith('__'):
                continue
            compared.append(name)
            mine = inspect.signature(method)
            theirs = inspect.signature(theirs)
            self.assertEqual(
                [(p.name, p.kind, p.default)
                 for p in theirs.parameters.values()],
                [(p.name, p.kind, p.default)
                 for p in mine.parameters.values()], name)
        # It compared something, and the methods without which nova-compute
        # does not work are among it.
        self.assertLessEqual(
            {'init_host', 'spawn', 'destroy', 'cleanup', 'reboot', 'power_on',
             'power_off', 'get_info', 'list_instance_uuids', 'plug_vifs',
             'resume_state_on_host_boot', 'get_available_nodes',
             'get_available_resource', 'update_provider_tree'},
            set(compared))

    def test_no_public_method_is_unknown_to_nova(self):
        # A method that Nova has renamed would silently never be called.
        for name, method in vars(driver.PyContainerDriver).items():
            if inspect.isfunction(method) and not name.startswith('_'):
                self.assertTrue(
                    hasattr(nova_driver.ComputeDriver, name), name)

    def test_capabilities_are_known_to_nova(self):
        self.assertEqual(
            set(nova_driver.ComputeDriver.capabilities),
            set(driver.PyContainerDriver.capabilities))
