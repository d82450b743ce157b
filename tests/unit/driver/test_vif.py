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

from unittest import mock

import ddt
from nova import exception
from nova.network import model
import os_vif
from os_vif import exception as os_vif_exception
from oslo_config import cfg
from oslo_utils.fixture import uuidsentinel as uuids
from vif_plug_ovs import ovs
from vif_plug_ovs.ovsdb import ovsdb_lib

from nova_pycontainer.runtime import network
from nova_pycontainer import vif
from tests.unit.driver import base


@ddt.ddt
class VifTestCase(base.TestCase):

    def test_nic(self):
        self.assertEqual({
            'id': uuids.port1, 'devname': 'tap' + uuids.port1[:11],
            'mac': 'fa:16:3e:00:00:01', 'mtu': 1442, 'tx_offload': True,
        }, vif.nic(base.make_vif()))

    def test_runtime_accepts_it(self):
        network.Nic.from_dict(vif.nic(base.make_vif()))

    def test_order_is_novas(self):
        ports = [base.make_vif(n) for n in (2, 1, 3)]
        self.assertEqual([p['id'] for p in ports],
                         [n['id'] for n in vif.nics(ports)])
        self.assertEqual([], vif.nics(None))

    @ddt.data(('auto', 'netdev', False), ('auto', 'system', True),
              ('auto', None, True), ('on', 'netdev', True),
              ('off', 'system', False))
    @ddt.unpack
    def test_tx_offload(self, option, datapath, expected):
        details = {} if datapath is None else {
            model.VIF_DETAILS_OVS_DATAPATH_TYPE: datapath}
        self.assertIs(expected, vif.nic(
            base.make_vif(details=details), option)['tx_offload'])

    @ddt.data(
        ({'type': model.VIF_TYPE_BINDING_FAILED}, 'not bound'),
        ({'type': model.VIF_TYPE_UNBOUND}, 'not bound'),
        ({'type': model.VIF_TYPE_BRIDGE}, 'Use ML2/OVN or ML2/OVS'),
        ({'type': model.VIF_TYPE_VHOSTUSER}, 'Use ML2/OVN or ML2/OVS'),
        ({'vnic_type': model.VNIC_TYPE_DIRECT}, 'vnic_type is direct'),
        ({'details': {model.VIF_DETAILS_OVS_HYBRID_PLUG: True}},
         'firewall_driver = openvswitch'))
    @ddt.unpack
    def test_refused_with_port_and_remedy(self, values, text):
        error = self.assertRaises(
            exception.VirtualInterfacePlugException, vif.nic,
            base.make_vif(**values))
        self.assertIn(uuids.port1, str(error))
        self.assertIn(text, str(error))

    def test_events_only_for_ports_known_to_be_down(self):
        ports = [base.make_vif(1, active=False), base.make_vif(2),
                 base.make_vif(3, active=None)]
        self.assertEqual([('network-vif-plugged', uuids.port1)],
                         vif.events_to_wait_for(ports))

    def test_plug_makes_the_switch_port_and_no_tap(self):
        with mock.patch.object(os_vif, 'plug', autospec=True) as plug:
            vif.plug(self.make_instance(), [base.make_vif()])
        vif_object, info = plug.call_args.args
        self.assertEqual(uuids.instance, info.uuid)
        self.assertEqual('ovs', vif_object.plugin)
        self.assertEqual('tap' + uuids.port1[:11], vif_object.vif_name)
        self.assertEqual('br-int', vif_object.bridge_name)
        self.assertIs(True, vif_object.port_profile.create_port)
        self.assertIs(False, vif_object.port_profile.create_tap)
        self.assertEqual(uuids.port1, vif_object.port_profile.interface_id)

    def test_tap_needs_no_os_vif(self):
        port = base.make_vif(type=model.VIF_TYPE_TAP)
        with mock.patch.object(os_vif, 'plug', autospec=True) as plug:
            vif.plug(self.make_instance(), [port])
        plug.assert_not_called()
        self.assertEqual(1442, vif.nic(port)['mtu'])

    def test_plug_anew_keeps_the_interface(self):
        tap = base.make_vif(2, type=model.VIF_TYPE_TAP)
        # As os_vif.initialize() does.
        cfg.CONF.register_opts(ovs.OvsPlugin.CONFIG_OPTS, group='os_vif_ovs')
        with mock.patch.object(
                ovsdb_lib, 'BaseOVS', autospec=True) as switch, (
                mock.patch.object(os_vif, 'plug', autospec=True)) as plug:
            vif.plug_anew(self.make_instance(), [base.make_vif(), tap])
        delete = switch.return_value.delete_ovs_vif_port
        delete.assert_called_once_with(
            'br-int', 'tap' + uuids.port1[:11], delete_netdev=False)
        plug.assert_called_once()

    def test_failed_plug_is_one_that_nova_handles(self):
        failure = os_vif_exception.PlugException(vif='v', err='no ovsdb')
        with mock.patch.object(os_vif, 'plug', autospec=True,
                               side_effect=failure):
            error = self.assertRaises(
                exception.VirtualInterfacePlugException, vif.plug,
                self.make_instance(), [base.make_vif()])
        self.assertIn('no ovsdb', str(error))

    def test_unplug_goes_on(self):
        failure = os_vif_exception.UnplugException(vif='v', err='no')
        with mock.patch.object(os_vif, 'unplug', autospec=True,
                               side_effect=[failure, None]) as unplug:
            vif.unplug(self.make_instance(), [
                base.make_vif(1, type='strange'), base.make_vif(2),
                base.make_vif(3)])
        self.assertEqual(2, unplug.call_count)
