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

from nova import exception
from oslo_utils.fixture import uuidsentinel as uuids
import testtools

from nova_pycontainer import errors as driver_errors
from nova_pycontainer.runtime import errors


def make(code='internal', message='it failed', **kwargs):
    return errors.ContainerError(code, message, uuid=uuids.instance, **kwargs)


class ReasonTestCase(testtools.TestCase):

    def test_everything_but_the_instance(self):
        error = make(step='prepare', cause='EPERM', remedy='Do this')
        self.assertEqual('it failed (step prepare): EPERM. Do this',
                         driver_errors.reason(error))

    def test_instance_is_taken_out(self):
        error = make(message=f'instance {uuids.instance}: no')
        self.assertEqual('no', driver_errors.reason(error))

    def test_remedy_is_whole_where_the_cause_is_long(self):
        error = make(cause='x' * 500, remedy='Upload it again')
        text = driver_errors.reason(error, 100)
        self.assertEqual(100, len(text))
        self.assertTrue(text.startswith('it failed: xx'), text)
        self.assertTrue(text.endswith('. Upload it again'), text)

    def test_long_remedy_leaves_a_third(self):
        error = make(remedy='r' * 500)
        text = driver_errors.reason(error, 90)
        self.assertLessEqual(len(text), 90)
        self.assertIn('it failed. r', text)

    def test_clip_keeps_both_ends(self):
        text = driver_errors.clip('entry a/b/c/' + 'd' * 100 + '/evil', 40)
        self.assertEqual(40, len(text))
        self.assertTrue(text.startswith('entry a/b'), text)
        self.assertTrue(text.endswith('/evil'), text)


class ToNovaTestCase(testtools.TestCase):

    def test_every_code_has_a_class_of_novas(self):
        for code in errors.CODES:
            result = driver_errors.to_nova(
                make(code), image_id=uuids.image)
            self.assertIsInstance(result, exception.NovaException)
            # oslo.messaging rebuilds no other on the other side.
            self.assertEqual('nova.exception', type(result).__module__)

    def test_classes(self):
        agent = errors.AgentUnavailable(
            'agent_unavailable', 'no answer', remedy='Start it')
        for error, expected in (
                (agent, exception.HypervisorUnavailable),
                (make('not_found'), exception.InstanceNotFound),
                (make('image_unsafe_entry'), exception.ImageUnacceptable),
                (make('image_no_init'), exception.ImageUnacceptable),
                (make('no_space'), exception.ComputeResourcesUnavailable),
                (make('no_base_id'), exception.ComputeResourcesUnavailable),
                (make('file_refused'), exception.InvalidInput),
                (make('network'), exception.VirtualInterfacePlugException),
                (make('oci_failed'), exception.InstanceDeployFailure)):
            self.assertIs(expected, type(driver_errors.to_nova(
                error, image_id=uuids.image)))

    def test_failure_of_the_operation(self):
        result = driver_errors.to_nova(
            make('timeout'), failure=exception.InstancePowerOffFailure)
        self.assertIsInstance(result, exception.InstancePowerOffFailure)
        self.assertIn('it failed', str(result))

    def test_image_fault_fits_with_image_entry_and_remedy(self):
        error = make(
            'image_unsafe_entry', "entry '" + 'deep/' * 60 + "../x' leaves "
            'the root directory', step='spawn.image',
            remedy='Build the image again without it')
        fault = exception.BuildAbortException(
            instance_uuid=uuids.instance,
            reason=driver_errors.to_nova(
                error, image_id=uuids.image).format_message())
        message = fault.format_message()
        self.assertLessEqual(len(message), 255)
        for part in (uuids.image, "entry 'deep/", 'leaves the root',
                     'Build the image again without it'):
            self.assertIn(part, message)

    def test_translated(self):
        def fail():
            with driver_errors.translated():
                raise make('oci_failed', step='create', cause='no memory')

        error = self.assertRaises(exception.InstanceDeployFailure, fail)
        self.assertIn('it failed (step create): no memory', str(error))

    def test_other_exceptions_pass(self):
        def fail():
            with driver_errors.translated():
                raise exception.ImageNotFound(image_id=uuids.image)

        self.assertRaises(exception.ImageNotFound, fail)
