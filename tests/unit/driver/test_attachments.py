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

from nova import exception
from nova import objects
from nova.tests.unit import fake_block_device
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import attachments
from nova_pycontainer import migration_recovery
from tests.unit.driver import base


class AttachmentsTest(base.TestCase):
    """After a restart, of the source of a live migration."""

    def setUp(self):
        super().setUp()
        self.instance = mock.Mock(
            uuid=uuids.instance, system_metadata={
                f'pycontainer_attachment_{uuids.volume}': uuids.source})
        patch = mock.patch.object(
            objects.BlockDeviceMappingList, 'get_by_instance_uuid',
            lambda context, uuid: objects.BlockDeviceMappingList(objects=[
                objects.BlockDeviceMapping(
                    self.context, **fake_block_device.AnonFakeDbBlockDeviceDict
                    ({'source_type': 'volume', 'destination_type': 'volume',
                      'volume_id': uuids.volume, 'device_name': '/dev/vdb',
                      'connection_info': '{"data": "destination"}',
                      'attachment_id': uuids.destination}))]))
        patch.start()
        self.addCleanup(patch.stop)
        self.manager = mock.Mock()

    def found(self):
        bdm, = attachments.of_source(
            self.context, self.manager.volume_api, self.instance)
        return bdm.attachment_id, bdm.connection_info

    def test_of_the_source(self):
        self.manager.volume_api.attachment_get.return_value = {
            'connection_info': {'data': 'source'}}
        attachment, info = self.found()
        self.assertEqual(uuids.source, attachment)
        self.assertIn('"source"', info)

    def test_deleted_already(self):
        self.manager.volume_api.attachment_get.side_effect = (
            exception.VolumeAttachmentNotFound(attachment_id=uuids.source))
        self.assertEqual(
            (uuids.source, '{"data": "destination"}'), self.found())

    def test_cinder_is_asked_until_it_answers(self):
        self.manager.volume_api.attachment_get.side_effect = [
            exception.CinderConnectionFailed(reason='it boots'),
            {'connection_info': {'data': 'source'}}]
        with mock.patch.object(
                migration_recovery.time, 'sleep', autospec=True) as sleep:
            bdm, = migration_recovery.Recovery._block_devices(
                self.context, self.manager, self.instance)
        self.assertEqual(uuids.source, bdm.attachment_id)
        sleep.assert_called_once_with(10.0)
