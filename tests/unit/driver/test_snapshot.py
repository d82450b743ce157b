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

"""Snapshots, from an agent in memory into a Glance in memory."""

import fixtures
from nova.compute import task_states
from nova import exception
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer.runtime import errors
from nova_pycontainer import snapshot
from tests.unit.driver import driver_base

PENDING = task_states.IMAGE_PENDING_UPLOAD
UPLOADING = task_states.IMAGE_UPLOADING


class Glance:
    """Images as nova.image.glance.API shows them."""

    def __init__(self):
        self.images = {uuids.snapshot: {
            'id': uuids.snapshot, 'name': 'snap', 'status': 'queued',
            'container_format': 'docker', 'properties': {'kept': 'yes'}}}
        self.data = None
        self.uploading = lambda: None

    def get(self, context, image_id):
        if image_id not in self.images:
            raise exception.ImageNotFound(image_id=image_id)
        return self.images[image_id]

    def update(self, context, image_id, info, data=None, purge_props=True):
        image = self.get(context, image_id)
        assert not purge_props
        image['properties'].update(info.pop('properties'))
        image.update(info)
        self.uploading()
        self.data = b''.join(iter(lambda: data.read(4), b''))


class SnapshotTestCase(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.glance = self.driver._snapshotter._api = Glance()
        self.states = []
        self.spawn()

    def snapshot(self):
        def update(task_state, expected_state=task_states.IMAGE_SNAPSHOT):
            self.states.append((task_state, expected_state))

        self.driver.snapshot(
            self.context, self.instance, uuids.snapshot, update)

    def test_an_image_is_filled(self):
        self.snapshot()
        self.assertEqual(b'a root file system', self.glance.data)
        self.assertEqual(
            [(PENDING, task_states.IMAGE_SNAPSHOT), (UPLOADING, PENDING)],
            self.states)
        image = self.glance.images[uuids.snapshot]
        self.assertEqual(('snap', 'raw', 'bare'), (
            image['name'], image['disk_format'], image['container_format']))
        self.assertEqual(
            {'kept': 'yes', 'image_location': 'snapshot',
             'image_state': 'available',
             'owner_id': self.instance.project_id}, image['properties'])

    def test_nova_gives_up_before_the_upload(self):
        def update(task_state, expected_state=None):
            if task_state == UPLOADING:
                raise exception.UnexpectedDeletingTaskStateError(
                    instance_uuid=uuids.instance, expected={}, actual={})

        self.assertRaises(
            exception.UnexpectedDeletingTaskStateError, self.driver.snapshot,
            self.context, self.instance, uuids.snapshot, update)
        self.assertIsNone(self.glance.data)

    def test_image_that_is_not_there(self):
        self.glance.images.clear()
        self.assertRaises(exception.ImageNotFound, self.snapshot)
        self.assertNotIn('snapshot', self.agent.calls)

    def test_image_that_is_deleted_while_it_is_read(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.snapshot._LOOK_S', 0.0))
        self.glance.uploading = self.glance.images.clear
        self.assertRaises(exception.ImageNotFound, self.snapshot)

    def test_upload_that_fails(self):
        def fail(error):
            raise error

        self.glance.uploading = lambda: fail(ZeroDivisionError())
        self.assertRaises(ZeroDivisionError, self.snapshot)
        # It failed because one of the two has gone.
        self.glance.uploading = lambda: (
            self.glance.images.clear(), fail(ZeroDivisionError()))
        self.assertRaises(exception.ImageNotFound, self.snapshot)
        self.glance.__init__()
        self.glance.uploading = lambda: (
            self.agent.containers.clear(), fail(ZeroDivisionError()))
        self.assertRaises(exception.InstanceNotFound, self.snapshot)

    def test_no_room_on_the_host(self):
        self.agent.failures['snapshot'] = errors.ContainerError(
            'no_space', 'no room', remedy='Free some')
        error = self.assertRaises(
            exception.ComputeResourcesUnavailable, self.snapshot)
        self.assertIn('Free some', str(error))
        self.agent.failures['snapshot'] = errors.ContainerError(
            'bad_state', 'it moves', remedy='Wait')
        error = self.assertRaises(exception.NovaException, self.snapshot)
        self.assertEqual('it moves (step snapshot.copy). Wait', str(error))
        self.assertIs(exception.NovaException, type(snapshot.failure('x')))

    def test_agent_that_is_gone(self):
        self.agent.down = True
        self.assertRaises(exception.HypervisorUnavailable, self.snapshot)
