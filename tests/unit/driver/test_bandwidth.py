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

"""``quota:vif_*`` of a flavor → limits of each interface."""

import ddt
from nova import exception
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import flavor
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import rate
from nova_pycontainer import vif
from tests.unit.driver import base
from tests.unit.driver import driver_base


def _specs(**values):
    return {f'quota:vif_{name}': value for name, value in values.items()}


@ddt.ddt
class BandwidthTestCase(base.TestCase):

    def bandwidth(self, **values):
        return flavor.bandwidth(
            base.make_flavor(extra_specs=_specs(**values)))

    def test_units_are_libvirts(self):
        """tc-units(7): ``kbps``, which libvirt gives it, is 1000 bytes."""
        self.assertEqual(
            {'inbound': {'average': 1_000_000, 'peak': 2_000_000,
                         'burst': 64 << 10},
             'outbound': {'average': 500_000, 'peak': None, 'burst': None}},
            self.bandwidth(inbound_average='1000', inbound_peak='2000',
                           inbound_burst='64', outbound_average='500'))

    def test_none(self):
        self.assertEqual({}, self.bandwidth())
        self.assertEqual({}, self.bandwidth(
            inbound_average='0', inbound_peak='0', outbound_burst='0'))

    def test_runtime_understands_the_largest(self):
        largest = str(rate.MAX // 1000)
        found = self.bandwidth(
            outbound_average=largest, outbound_peak=largest,
            outbound_burst=str(rate.MAX // 1024))
        nic = network.Nic.from_dict(vif.nic(
            base.make_vif(), bandwidth=found))
        self.assertEqual(rate.Rate(**found['outbound']), nic.outbound)
        self.assertIsNone(nic.inbound)
        self.assertTrue(nic.limited)
        self.assertEqual(nic, network.Nic.from_dict(nic.to_dict()))

    @ddt.data(
        ({'inbound_peak': '5'}, 'quota:vif_inbound_average'),
        ({'outbound_average': '0', 'outbound_burst': '5'},
         'quota:vif_outbound_average'),
        ({'inbound_average': '5', 'inbound_peak': '4'},
         'quota:vif_inbound_peak'),
        ({'inbound_average': '5', 'inbound_burst': '1251'},
         'quota:vif_inbound_burst'),
        ({'outbound_average': '-1'}, 'quota:vif_outbound_average'),
        ({'outbound_average': 'fast'}, 'quota:vif_outbound_average'),
        ({'outbound_average': str(rate.MAX // 1000 + 1)},
         'quota:vif_outbound_average'),
        # VMware's.
        ({'limit': '10'}, 'quota:vif_limit'))
    @ddt.unpack
    def test_refused_by_name(self, values, text):
        error = self.assertRaises(
            exception.InvalidInput, self.bandwidth, **values)
        self.assertIn(text, str(error))
        # Before anything is made.
        self.assertRaises(
            exception.InvalidInput, flavor.resources,
            base.make_flavor(extra_specs=_specs(**values)), 4096)


class StartTestCase(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.limit(1000)

    def limit(self, average):
        self.instance.flavor.extra_specs = _specs(
            outbound_average=str(average))
        self.expected = {'average': average * 1000, 'peak': None,
                         'burst': None}

    def assert_limited(self):
        item = self.agent.containers[uuids.instance]
        self.assertEqual([self.expected] * 2, [
            nic.get('outbound') for nic in item['nics']])

    def test_started_with_another_limit(self):
        self.spawn()
        self.assert_limited()
        # As a resize does.
        self.driver.power_off(self.instance)
        self.limit(2000)
        self.driver.power_on(
            self.context, self.instance, self.network_info)
        self.assert_limited()
