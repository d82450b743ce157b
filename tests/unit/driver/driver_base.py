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

"""A driver over an agent in memory."""

import hashlib

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import driver
from tests.unit.driver import base
from tests.unit.driver import test_image


class Driver(driver.PyContainerDriver):
    """With the agent that the test has given."""

    agent = None

    def _agent_client(self, host):
        return self.agent

    def _node_uuid(self, host):
        return getattr(uuids, f'node_{host}')


class Base(base.TestCase):

    def setUp(self):
        super().setUp()
        self.plugged = {}
        self.useFixture(fixtures.MonkeyPatch('os_vif.plug', self._plug))
        self.useFixture(fixtures.MonkeyPatch('os_vif.unplug', self._unplug))
        # Of the database: who has tagged what.
        self.tagged = []
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.VirtualInterfaceList.get_by_instance_uuid',
            staticmethod(lambda context, uuid: self.tagged)))
        self.bdms = []
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.BlockDeviceMappingList.get_by_instance_uuid',
            staticmethod(lambda context, uuid: self.bdms)))
        self.virtapi = base.VirtAPI()
        self.driver = Driver(self.virtapi)
        self.driver.agent = self.agent
        self.driver.init_host('host1')
        data = base.make_tarball()
        self.driver._images._api = test_image.Glance(
            data, os_hash_algo='sha256',
            os_hash_value=hashlib.sha256(data).hexdigest())
        self.instance = self.make_instance()
        self.network_info = [base.make_vif(1), base.make_vif(2)]

    def _plug(self, vif, info):
        self.plugged[vif.vif_name] = info.uuid

    def _unplug(self, vif, info):
        self.plugged.pop(vif.vif_name, None)

    def spawn(self, **kwargs):
        kwargs.setdefault('network_info', self.network_info)
        self.driver.spawn(
            self.context, self.instance, self.make_image_meta(), [], None,
            {}, **kwargs)

    def state(self):
        return self.driver.get_info(self.instance).state

    def assert_nothing_left(self):
        self.assertEqual({}, self.agent.containers)
        self.assertEqual({}, self.agent.links)
        self.assertEqual({}, self.plugged)
        self.assertNotIn('pycontainer_base_id', self.instance.system_metadata)
