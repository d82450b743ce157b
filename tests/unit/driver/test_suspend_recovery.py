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

"""A nova-compute that ends while its agent suspends or resumes."""

import time

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import suspend_recovery
from tests.unit.driver import driver_base


class SettleTestCase(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.spawn()
        self.item = self.agent.containers[uuids.instance]
        self.saved = []
        self.instance.save = lambda **expected: self.saved.append(
            (self.instance.vm_state, self.instance.power_state,
             self.instance.task_state))
        self.instance.refresh = lambda: None
        self.recovery = suspend_recovery.Recovery(self.agent)

    def settle(self, task, state):
        self.instance.task_state = task
        self.item['state'] = state
        self.recovery.settle([self.instance])
        return self.saved

    def test_suspended_meanwhile(self):
        self.assertEqual(
            [(vm_states.SUSPENDED, power_state.SUSPENDED, None)],
            self.settle(task_states.SUSPENDING, 'suspended'))

    def test_not_yet(self):
        self.assertEqual(
            [(vm_states.SUSPENDED, power_state.SUSPENDED, None)],
            self.settle(task_states.SUSPENDING, 'running'))
        self.assertEqual('suspended', self.item['state'])

    def test_resumed_meanwhile(self):
        self.assertEqual(
            [(vm_states.ACTIVE, power_state.RUNNING, None)],
            self.settle(task_states.RESUMING, 'running'))

    def test_power_was_lost_meanwhile(self):
        for task in task_states.SUSPENDING, task_states.RESUMING:
            self.saved.clear()
            self.instance.vm_state = vm_states.SUSPENDED
            self.assertEqual(
                [(vm_states.ACTIVE, power_state.RUNNING, None)],
                self.settle(task, 'stopped'))

    def test_request_to_resume_is_on_its_way(self):
        self.assertEqual([], self.settle(task_states.RESUMING, 'suspended'))
        self.recovery.asked(self.instance)
        self.recovery.give_up(self.instance)
        self.assertEqual([], self.saved)

    def test_request_to_resume_has_ended_with_the_process(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.suspend_recovery._MESSAGE_S', 0.01))
        self.settle(task_states.RESUMING, 'suspended')
        self.instance.vm_state = vm_states.SUSPENDED
        self.recovery.start()
        while not self.saved:
            time.sleep(0.01)
        self.assertEqual((vm_states.SUSPENDED, None), self.saved[0][::2])

    def test_others_are_left_alone(self):
        self.assertEqual([], self.settle(task_states.PAUSING, 'running'))
        self.assertEqual([], self.settle(None, 'suspended'))
