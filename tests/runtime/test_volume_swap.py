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

"""A volume in the place of another, under a guest that runs."""

import pathlib

from nova_pycontainer.runtime import errors
from tests import cases
from tests import loop
from tests.runtime import base
from tests.runtime import test_volumes

_STEPS = ('swap-copy', 'swap-limit', 'swap-show', 'swap-record')


class TestCase(test_volumes.TestCase):

    def setUp(self):
        super().setUp()
        self.old, self.new = self.device(), self.device()
        self.volume_old = self.volume(self.old)
        self.volume_new = self.volume(self.new)
        self.uuid = self.run_container(volumes=[self.volume_old])
        self.write(self.uuid, 'before')

    def begin(self):
        return self.a.volume_swap(
            self.uuid, self.volume_old['id'], self.volume_new)

    def ended(self, phase):
        base.wait_for(lambda: self.a.volume_swap_status(
            self.uuid)['phase'] != 'copying', 'the end of the copying')
        status = self.a.volume_swap_status(self.uuid)
        self.assertEqual(phase, status['phase'], status)
        return status

    def opens(self, count=6):
        return self.sh(
            self.a, self.uuid, f'if dd if=/dev/vdb bs={count} count=1 '
            '2>/dev/null; then :; else echo refused; fi')

    def assert_has(self, device, other, text):
        self.write(self.uuid, text)
        self.assertEqual(text, self.opens(len(text)))
        self.assertEqual(text.encode(), device.read(len(text)))
        self.assertNotEqual(text.encode(), other.read(len(text)))
        self.assertEqual(['vdb'], self.names(self.uuid))


class VolumeSwapTestCase(TestCase):

    def test_replaced(self):
        self.new.grow(24 << 20)
        last = (16 << 20) - 6
        self.sh(self.a, self.uuid, f'printf %s behind | dd of=/dev/vdb bs=1 '
                f'seek={last} conv=notrunc,fsync 2>/dev/null; '
                'chown 5:6 /dev/vdb')
        go = pathlib.Path(self.top, 'go')
        self.a.restart_agent(f'swap-copy=wait:{go}')
        self.begin()
        # Nobody writes to what is being copied, nor does it go away.
        self.assertEqual('refused', self.opens())
        self.refused('bad_state', self.a.volume_detach, self.uuid,
                     self.volume_old['id'])
        self.refused('bad_state', self.begin)
        error = self.refused('bad_state', self.a.suspend, self.uuid)
        self.assertIn('is being replaced', str(error))
        go.touch()
        status = self.ended('completed')
        self.assertEqual(16 << 20, status['copied_bytes'])
        self.assertEqual('before', self.opens())
        self.assertEqual(b'behind', self.new.read(6, last))
        self.assertEqual(str(24 << 20), self.sh(
            self.a, self.uuid, 'blockdev --getsize64 /dev/vdb'))
        self.assertEqual('5 6', self.sh(
            self.a, self.uuid, 'stat -c "%u %g" /dev/vdb'))
        self.assert_has(self.new, self.old, 'after')
        [told] = self.a.info(self.uuid)['volumes']
        self.assertEqual((self.volume_new['id'], self.new.path), (
            told['id'], told['path']))
        self.a.kill_agent()
        self.a.restart_agent()
        self.assert_has(self.new, self.old, 'later')
        self.a.volume_detach(self.uuid, self.volume_new['id'])
        self.assertEqual([], self.names(self.uuid))

    def test_in_use(self):
        self.sh(self.a, self.uuid, test_volumes.HOLD)
        self.refused('in_use', self.begin)
        self.assert_has(self.old, self.new, 'still')
        self.sh(self.a, self.uuid, test_volumes.LET_GO)
        self.begin()
        self.ended('completed')

    @cases.more
    def test_too_small(self):
        small = loop.Loop(pathlib.Path(self.top, 'small'), 8 << 20)
        self.addCleanup(small.close)
        self.a.volume_swap(
            self.uuid, self.volume_old['id'], self.volume(small))
        self.assertIn('has 8388608 bytes', self.ended(
            'failed')['error']['message'])
        self.assert_has(self.old, self.new, 'still')

    def test_started_anew(self):
        """What runs then has the old one, and writes to it."""
        go = pathlib.Path(self.top, 'go')
        self.a.restart_agent(f'swap-copy=wait:{go}')
        self.begin()
        self.a.kill(self.uuid)
        self.a.prepare(self.uuid)
        self.attach(self.a, self.uuid)
        self.a.start_container(self.uuid)
        self.assert_has(self.old, self.new, 'anew')
        go.touch()
        self.assertEqual('aborted', self.ended('failed')['error']['code'])
        self.assert_has(self.old, self.new, 'still')

    @cases.more
    def test_of_one_that_is_down(self):
        self.a.kill(self.uuid)
        self.begin()
        self.ended('completed')
        self.a.prepare(self.uuid)
        self.attach(self.a, self.uuid)
        self.a.start_container(self.uuid)
        self.assertEqual('before', self.opens())
        self.assert_has(self.new, self.old, 'after')


class FailuresTestCase(TestCase):

    def test_a_step_fails(self):
        for step in _STEPS:
            self.a.restart_agent(f'{step}=raise')
            self.begin()
            self.assertEqual(step, self.ended('failed')['error']['step'])
            self.assert_has(self.old, self.new, f'after {step}')
        self.begin()
        self.ended('completed')
        self.assertEqual('after', self.opens(5))

    def test_agent_is_killed(self):
        for step in _STEPS:
            self.a.restart_agent(f'{step}=kill')
            try:
                self.begin()
            except errors.AgentUnavailable:
                pass
            self.a.process.wait(base.PATIENCE)
            self.a.restart_agent()
            self.refused('not_found', self.a.volume_swap_status, self.uuid)
            self.assert_has(self.old, self.new, f'after {step}')
        self.begin()
        self.ended('completed')
