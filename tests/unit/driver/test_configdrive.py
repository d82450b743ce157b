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
import json

import fixtures
from nova import objects
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import configdrive
from tests.unit.driver import base


class ConfigDriveTestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        # Neutron's and the database's answers; the drive's content is made
        # by Nova's own code.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.network.security_group_api.get_instance_security_groups',
            lambda context, instance, detailed=False: [{'name': 'default'}]))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.BlockDeviceMappingList.get_by_instance_uuid',
            lambda cls, context, uuid: objects.BlockDeviceMappingList(
                objects=[])))

    def files(self, config_drive='True', injected=None, secret=None):
        instance = self.make_instance(
            config_drive=config_drive, key_name='key',
            user_data=base64.b64encode(b'#cloud-config\n').decode(),
            display_name='web', launch_index=0, reservation_id='r-1',
            availability_zone='nova', metadata={})
        instance.keypairs = objects.KeyPairList(objects=[objects.KeyPair(
            name='key', public_key='ssh-ed25519 AAAA', type='ssh')])
        instance.ec2_ids = objects.EC2Ids(
            instance_id='i-1', ami_id='ami-1', kernel_id=None,
            ramdisk_id=None)
        instance.device_metadata = None
        instance.numa_topology = None
        files = configdrive.files(
            instance, injected, secret, [base.make_vif()])
        return None if files is None else {
            path: base64.b64decode(content)
            for path, content in files.items()}

    def test_key_user_data_network_and_password(self):
        files = self.files(injected=[('/etc/motd', b'hello')],
                           secret='s3cret')
        metadata = json.loads(files['openstack/latest/meta_data.json'])
        self.assertEqual(uuids.instance, metadata['uuid'])
        self.assertEqual({'key': 'ssh-ed25519 AAAA'},
                         metadata['public_keys'])
        self.assertEqual('s3cret', metadata['admin_pass'])
        self.assertEqual(b'#cloud-config\n',
                         files['openstack/latest/user_data'])
        network = json.loads(files['openstack/latest/network_data.json'])
        self.assertEqual('fa:16:3e:00:00:01',
                         network['links'][0]['ethernet_mac_address'])
        content = metadata['files'][0]['content_path']
        self.assertEqual(b'hello', files['openstack' + content])

    def test_dated_directory_that_ds_identify_looks_for(self):
        self.assertTrue(any(
            path.startswith('openstack/20') and
            path.endswith('/meta_data.json') for path in self.files()))

    def test_none_where_none_is_wanted(self):
        self.assertIsNone(self.files(config_drive=''))

    def test_forced(self):
        self.flags(force_config_drive=True)
        self.assertIsNotNone(self.files(config_drive=''))
