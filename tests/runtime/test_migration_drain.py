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

"""An agent is stopped, as for an upgrade, while pages follow a guest."""

import os
import signal
import subprocess

from tests.runtime import base
from tests.runtime import test_migration_faults

#: Keeps 64 MiB in the memory of dd, and sums them up when it may.
_HOLD = """
dd if=/dev/urandom of=/file bs=1M count=8 2>/dev/null
echo 'cat /file /file /file /file /file /file /file /file' > /many
setsid sh -c 'sh /many | dd bs=64M count=1 iflag=fullblock | (until [ -e /go ]
do sleep 0.1; done; md5sum > /sum.new; mv /sum.new /sum)' \
    </dev/null >/dev/null 2>&1 &
until [ "$(cat /proc/$(pidof dd)/statm | cut -d" " -f2)" -gt 16384 ]; do
sleep 0.1; done
"""


class DrainTestCase(test_migration_faults.Helpers):

    def _in_the_middle(self):
        """:returns: a guest whose pages are on their way, its migration, and
            what its memory sums up to
        """
        uuid = self._boot()
        self.sh(self.a, uuid, _HOLD)
        right = self.sh(self.a, uuid, 'sh /many | md5sum')
        migration = self.prepare_migration(
            uuid, self.a, self.b, strategy='post-copy',
            permit_post_copy=True, bandwidth=5 << 20)
        for host in self.a, self.b:
            base.wait_for(lambda h=host: self._phase(h, migration) ==
                          'running', 'the guest to run')
        return uuid, migration, right

    def _phase(self, host, migration):
        return host.migration_status(migration)['phase']

    def _stop(self, host):
        """It has been told to end, and waits."""
        host.process.send_signal(signal.SIGTERM)
        base.wait_for(lambda: 'waiting for the end of its post-copy' in
                      host.log.read_text(), 'the agent to wait')
        self.assertIsNone(host.process.poll())

    def _check(self, uuid, right):
        root = f'/proc/{self.b.info(uuid)["pid"]}/root'
        os.close(os.open(f'{root}/go', os.O_CREAT | os.O_WRONLY))
        self.assertEqual(right, base.wait_for(
            lambda: self.sh(self.b, uuid, 'cat /sum 2>/dev/null || :'),
            'the sum of its memory'))
        self._settled(uuid, ['b'])

    def _restart(self, host, other):
        """As for an upgrade of one: nothing is lost."""
        uuid, migration, right = self._in_the_middle()
        self._stop(host)
        self.assertEqual(0, host.process.wait(base.PATIENCE))
        base.wait_for(lambda: self._phase(other, migration) == 'completed',
                      f'the end on {other.name}')
        host.start_agent()
        self._check(uuid, right)
        self._check_clean(self.a, uuid)

    def test_source(self):
        self._restart(self.a, self.b)

    def test_destination(self):
        self._restart(self.b, self.a)

    def test_before_it_is_given(self):
        """It stays: nothing may be given away by an agent that ends."""
        uuid = self._boot()
        self.a.restart_agent(faults='source.ready=sleep:3')
        migration = self.prepare_migration(
            uuid, self.a, self.b, strategy='post-copy', permit_post_copy=True)
        base.wait_for(lambda: self._phase(self.b, migration) == 'ready',
                      'the destination to be ready')
        self.a.stop_agent()
        self.assertIn('the agent is told to end', self.a.log.read_text())
        self.a.faults = ''
        self.a.start_agent()
        self._settled(uuid, ['a'])
        self._check_clean(self.b, uuid)

    def test_told_twice(self):
        """Then it ends, and what that means for the guest is said."""
        uuid, migration, _ = self._in_the_middle()
        self._stop(self.b)
        self.b.process.terminate()
        try:
            self.b.process.wait(5)
        except subprocess.TimeoutExpired:
            self.fail(self.b.log.read_text())
        self.assertIn(f'post-copy of instance {uuid}', self.b.log.read_text())
        base.wait_for(lambda: self._phase(self.a, migration) in
                      ('failed', 'completed'), 'the end on the source')
