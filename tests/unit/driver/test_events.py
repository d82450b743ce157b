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

import threading
import time

from nova.virt import event as virtevent
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import events
from tests.unit.driver import base


def wait_for(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f'{what} did not happen')
        time.sleep(0.01)


class WatcherTestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self.emitted = []
        self.changes = []
        self.rebooted = []
        self.settles = True
        self.now = 0
        self.watcher = self.make()

    def make(self):
        return events.Watcher(
            self.agent,
            lambda e: self.emitted.append((e.uuid, e.transition)),
            lambda: self._change('up'),
            lambda error: self._change(str(error)),
            on_reboot=self.rebooted.append, patience=10, poll=0.2,
            retry=0.01, clock=lambda: self.now)

    def _change(self, change):
        self.changes.append(change)
        return self.settles

    def start(self):
        self.watcher.start()
        self.addCleanup(self._join, self.watcher)
        wait_for(lambda: 'up' in self.changes, 'the first contact')
        wait_for(lambda: self.agent.calls.count('events') > 1, 'the wait')

    @staticmethod
    def _join(watcher):
        watcher.stop()
        watcher._thread.join(30)

    def container(self, state, uuid=uuids.instance):
        self.agent.containers[uuid] = {
            'uuid': uuid, 'name': 'i', 'state': state, 'nics': [],
            'exit': None, 'console': b''}
        return uuid

    def test_guest_that_powers_itself_off(self):
        uuid = self.container('running')
        self.start()
        self.agent.guest_powers_off(uuid)
        wait_for(lambda: self.emitted, 'the event')
        self.assertEqual(
            [(uuid, virtevent.EVENT_LIFECYCLE_STOPPED)], self.emitted)

    def test_all_kinds(self):
        self.container('running')
        self.start()
        for kind in ('paused', 'unpaused', 'rebooted', 'started', 'stopped',
                     'something-new'):
            self.agent._event(kind, uuids.instance)
        wait_for(lambda: len(self.emitted) >= 5, 'the events')
        self.assertEqual(
            [virtevent.EVENT_LIFECYCLE_PAUSED,
             virtevent.EVENT_LIFECYCLE_RESUMED,
             virtevent.EVENT_LIFECYCLE_STARTED,
             virtevent.EVENT_LIFECYCLE_STARTED,
             virtevent.EVENT_LIFECYCLE_STOPPED],
            [transition for _, transition in self.emitted])
        self.assertEqual([uuids.instance], self.rebooted)

    def test_what_happened_before_is_found_and_not_repeated(self):
        stopped = self.container('running', uuids.stopped)
        self.agent.guest_powers_off(stopped)
        self.container('running', uuids.running)
        self.agent._event('paused', uuids.running)
        self.start()
        self.agent._event('paused', uuids.last)
        wait_for(lambda: len(self.emitted) >= 2, 'the events')
        self.assertEqual(
            [(stopped, virtevent.EVENT_LIFECYCLE_STOPPED),
             (uuids.last, virtevent.EVENT_LIFECYCLE_PAUSED)], self.emitted)

    def test_lost_and_found(self):
        uuid = self.container('running')
        self.start()
        self.agent.down = True
        wait_for(lambda: self.watcher.failure, 'the loss')
        # A short absence is nobody's business.
        self.assertEqual(['up'], self.changes)
        self.now = 10
        wait_for(lambda: len(self.changes) > 1, 'the report')
        self.assertIn('does not answer', self.changes[1])
        self.assertIn('Start pycontainer-agent', self.changes[1])
        # Once for each transition.
        self.now = 100
        calls = self.agent.calls.count('events')
        wait_for(lambda: self.agent.calls.count('events') > calls + 3,
                 'more attempts')
        self.assertEqual(2, len(self.changes))
        # No event says that anything has stopped, for nobody knows.
        self.assertEqual([], self.emitted)

        self.agent.guest_powers_off(uuid)
        self.agent.down = False
        wait_for(lambda: len(self.changes) > 2, 'the return')
        self.assertEqual('up', self.changes[2])
        self.assertIsNone(self.watcher.failure)
        wait_for(lambda: self.emitted, 'the event')
        self.assertEqual(
            [(uuid, virtevent.EVENT_LIFECYCLE_STOPPED)], self.emitted)

    def test_changes_that_fail_are_made_again(self):
        """The database may be gone with the agent, and come back later."""
        self.settles = False
        self.start()
        wait_for(lambda: len(self.changes) > 2, 'another attempt')
        self.assertEqual({'up'}, {*self.changes})
        self.settles = True
        self.agent.down = True
        wait_for(lambda: self.watcher.failure, 'the loss')
        self.settles = False
        self.now = 10
        self.changes.clear()
        wait_for(lambda: len(self.changes) > 2, 'another attempt')
        self.assertEqual(1, len({*self.changes}))
        self.settles = True
        count = len(self.changes)
        wait_for(lambda: len(self.changes) > count, 'the last attempt')
        calls = self.agent.calls.count('events')
        count = len(self.changes)
        wait_for(lambda: self.agent.calls.count('events') > calls + 3,
                 'more attempts')
        self.assertLessEqual(len(self.changes), count + 1)

    def test_a_failing_listener_does_not_end_it(self):
        self.container('running')
        failed = threading.Event()

        def emit(event):
            if not failed.is_set():
                failed.set()
                raise ValueError('listener')
            self.emitted.append(event.uuid)

        self.watcher._emit = emit
        self.start()
        self.agent._event('paused', uuids.one)
        wait_for(failed.is_set, 'the failure')
        wait_for(lambda: self.changes.count('up') > 1, 'a new start')
        wait_for(lambda: self.agent.calls.count('events') > 4, 'the wait')
        self.agent._event('paused', uuids.two)
        wait_for(lambda: self.emitted, 'the event')
        self.assertEqual([uuids.two], self.emitted)

    def test_starts_once_and_not_after_the_end(self):
        self.start()
        thread = self.watcher._thread
        self.watcher.start()
        self.assertIs(thread, self.watcher._thread)
        ended = self.make()
        ended.stop()
        ended.start()
        self.assertIsNone(ended._thread)
