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

"""Live migration between two hosts, by the runtime alone."""

import base64
import signal
import time

from tests import echo
from tests.runtime import base
from tests.runtime import hosts

METADATA = base64.b64encode(b'{"uuid": "i-x"}').decode()


class MigrationTestCase(hosts.TwoHostsTestCase):

    def test_busybox_there_and_back(self):
        uuid = self.run_container(address='203.0.113.10')
        self.sh(self.a, uuid, 'echo kept > /root/file; echo x > /run/memory; '
                'setsid tail -f /etc/inittab </dev/null >/dev/null 2>&1 &')
        here, there = self.a, self.b
        for _ in range(2):
            self.migrate(uuid, here, there)
            here, there = there, here
            self.assertEqual('running', here.info(uuid)['state'])
            self.assertEqual([], there.list())
            self.assertEqual('kept', self.sh(here, uuid, 'cat /root/file'))
            self.assertEqual('x', self.sh(here, uuid, 'cat /run/memory'))
            self.sh(here, uuid, 'ps | grep -q "[t]ail -f"')
            self.assertGreater(here.info(uuid)['memory_bytes'], 0)
        # The limits hold as they did.
        done = here.exec(uuid, ['/bin/sh', '-c', 'tail /dev/zero'],
                         timeout_s=base.PATIENCE)
        self.assertIn(done['exit_code'], (137, -signal.SIGKILL))
        self.assertEqual(1, here.info(uuid)['oom_kills'])


#: A service in the guest, as an administrator would add one.
ECHO_UNIT = f'''
cat > /usr/local/bin/echo-service <<END
{echo.SERVICE}
END
cat > /etc/systemd/system/echo.service <<END
[Service]
ExecStart=/usr/bin/python3 /usr/local/bin/echo-service
[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload
systemctl enable --now echo.service
'''


class SystemdMigrationTestCase(hosts.TwoHostsTestCase):
    """Unmodified systemd guests, with connections, there and back."""

    def _boot(self, name):
        self.dhcp()
        uuid = self.run_container(
            name, memory=1024, address=None, nics=[{
                'id': '0123456789a-x', 'devname': 'tap0123456789a',
                'mac': 'fa:16:3e:00:00:32', 'mtu': 1500,
                'tx_offload': True}], config_drive={
                    'openstack/latest/meta_data.json': METADATA,
                    'openstack/2015-10-15/meta_data.json': METADATA})
        base.wait_for(lambda: self._settled(self.a, uuid), 'systemd', 240)
        self.assertEqual('running', self._settled(self.a, uuid))
        self.sh(self.a, uuid, ECHO_UNIT)
        return uuid, self.lease()

    def _settled(self, host, uuid):
        state = self.sh(
            host, uuid, 'systemctl is-system-running || true')
        return state if state in ('running', 'degraded') else None

    def _busy(self, host, uuid, seconds=2):
        """CPU time that the guest uses while nobody asks it anything."""
        before = host.info(uuid)['cpu_time_ns']
        time.sleep(seconds)
        return (host.info(uuid)['cpu_time_ns'] - before) / 1e9 / seconds

    def _there_and_back(self, name, moves, **options):
        uuid, address = self._boot(name)
        stream = echo.Echo(address)
        here, there = self.a, self.b
        booted = here.console_log(uuid)
        gaps = []
        for _ in range(moves):
            stream.reset()
            source, destination = self.migrate(
                uuid, here, there, **options)
            here, there = there, here
            self._goes_on(stream)
            gaps.append((stream.longest, source['frozen'],
                         source['steps'], destination['steps']))
        stream.finish()
        print(name, *gaps, sep='\n')
        self.assertEqual('running', self._settled(here, uuid))
        # The kernel's messages still reach whoever waits for them.
        self.sh(here, uuid, 'ip link add probe type veth peer name other')
        base.wait_for(
            lambda: 'network1/link' in self.sh(
                here, uuid, 'busctl call org.freedesktop.network1 '
                '/org/freedesktop/network1 org.freedesktop.network1.Manager '
                'GetLinkByName s probe || :'), 'networkd to see it')
        self.sh(here, uuid, 'ip link del probe')
        # A spinning process is at a whole CPU, for ever; this is far from it
        # when all have heard of the links.
        base.wait_for(lambda: self._busy(here, uuid) < 0.25, 'rest')
        self.sh(here, uuid, 'systemctl restart echo && echo moved > '
                '/dev/console')
        self.assertEqual([], there.list())
        base.wait_for(
            lambda: b'moved' in here.console_log(uuid), 'the console')
        # What was there before the moves is there still.
        self.assertNotEqual(b'', booted)
        self.assertEqual(booted, here.console_log(uuid)[:len(booted)])

    def _goes_on(self, stream):
        received = stream.received
        base.wait_for(lambda: stream.received > received + 20,
                      f'the stream to go on: {stream.error!r}')

    def test_debian13(self):
        self._there_and_back('debian13', 4)

    def test_debian12(self):
        self._there_and_back('debian12', 2)

    def test_debian13_post_copy(self):
        self._there_and_back(
            'debian13', 2, strategy='post-copy', permit_post_copy=True)
