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

"""Rescue, over an agent in memory."""

import fixtures
from nova.compute import power_state
from nova import exception
from nova.network import model
from nova import objects
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import revert
from tests.unit.driver import driver_base


class RescueTestCase(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.spawn()
        self.driver.power_off(self.instance)
        self.driver._rescuer._api = self.driver._images._api
        self.instance.info_cache = objects.InstanceInfoCache(
            network_info=model.NetworkInfo(self.network_info))

    def rescue(self, **properties):
        self.driver._images._api.meta['properties'] = properties
        self.driver.rescue(
            self.context, self.instance, self.network_info,
            self.make_image_meta(id=uuids.rescue), 'secret', {}, [])

    @property
    def item(self):
        return self.agent.containers[uuids.instance]

    def test_rescue_and_unrescue(self):
        self.rescue(pycontainer_init='/bin/repair --all')
        self.assertEqual(power_state.RUNNING, self.state())
        self.assertEqual(['/bin/repair', '--all'],
                         self.item['rescue']['init']['argv'])
        self.assertEqual(uuids.rescue, self.item['image_id'])
        self.assertEqual(2, len(self.plugged))
        self.driver.unrescue(self.context, self.instance)
        self.assertEqual(power_state.RUNNING, self.state())
        self.assertIsNone(self.item['rescue'])
        self.assertEqual(2, len(self.plugged))

    def test_rebooted_when_it_could_not_be_ended(self):
        """It gets its own root, unless it is rescued still."""
        for state, rescued in (('rescued', True), ('error', False)):
            self.rescue()
            self.instance.vm_state = state
            self.driver.reboot(
                self.context, self.instance, self.network_info, 'HARD')
            self.assertEqual(power_state.RUNNING, self.state())
            self.assertEqual(rescued, self.item['rescue'] is not None)
            self.driver.power_off(self.instance)

    def test_each_step_fails_and_leaves_it_as_it_was(self):
        names = []
        self.addCleanup(setattr, revert, 'fault_hook', None)
        revert.fault_hook = names.append
        self.rescue()
        self.agent.unrescue(uuids.instance)
        self.assertIn('rescue.rescue', names)
        for name in names:
            def fail(step, name=name):
                if step == name:
                    raise errors.ContainerError('internal', f'no {name}')

            revert.fault_hook = fail
            error = self.assertRaises(exception.NovaException, self.rescue)
            self.assertIn(f'no {name}', str(error))
            self.assertIsNone(self.item['rescue'])
            self.assertEqual(power_state.SHUTDOWN, self.state())
        revert.fault_hook = None
        self.rescue()

    def test_image_with_a_wrong_property(self):
        self.assertRaises(
            exception.ImageUnacceptable, self.rescue,
            pycontainer_stop_signal='no signal')
        self.assertNotIn('rescue', self.agent.calls)

    def test_password_goes_into_the_config_drive(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.configdrive.files',
            lambda instance, files, password, network_info:
            {'password': password}))
        self.rescue()
        self.assertEqual(
            {'password': 'secret'}, self.item['rescue']['config_drive'])
