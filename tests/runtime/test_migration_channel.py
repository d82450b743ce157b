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

"""What crosses the wire in a migration, and who is let in."""

import base64
import subprocess
import time
import uuid as uuidlib

from tests.runtime import base
from tests.runtime import hosts


class ChannelTestCase(hosts.TwoHostsTestCase):

    def test_nothing_of_the_guest_crosses_in_clear(self):
        memory, file = (uuidlib.uuid4().hex for _ in range(2))
        uuid = self.run_container(address='203.0.113.10')
        # One secret is in a process's memory only, one in a file only.
        self.sh(self.a, uuid, f'echo {file} > /root/secret; '
                f'setsid sh -c "x={memory}; while :; do sleep 1; done" '
                '</dev/null >/dev/null 2>&1 &')
        capture = self.top / 'capture'
        dump = subprocess.Popen(
            self.a.enter('tcpdump', '-i', 'hostlink', '-w', str(capture),
                         '-U', '--immediate-mode', '-Z', 'root'),
            stderr=subprocess.PIPE)
        self.assertIn(b'listening', dump.stderr.readline())
        self.migrate(uuid, self.a, self.b)
        time.sleep(1)
        dump.terminate()
        dump.communicate(timeout=base.PATIENCE)
        seen = capture.read_bytes()
        # The capture has the migration, or it would prove nothing.
        self.assertGreater(len(seen), 100000)
        for secret in (memory, file):
            for form in (secret.encode(), base64.b64encode(secret.encode())):
                self.assertNotIn(form, seen)
        self.assertEqual(file, self.sh(self.b, uuid, 'cat /root/secret'))

    def test_a_peer_with_another_certificate_is_refused(self):
        uuid = self.run_container()
        migration = str(uuidlib.uuid4())
        info = self.a.info(uuid)
        spec = {**info['spec'], 'base_id': info['base_id']}
        # The destination is told of another source than the one that comes.
        stranger = self.b.host_info()['migration']
        endpoint = self.b.migration_prepare(uuid, migration, spec, stranger)
        self.a.migration_begin(uuid, migration, endpoint)
        status = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')
        self.assertEqual('failed', status['phase'])
        self.assertEqual('forbidden', status['error']['code'])
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.b.migration_abort(migration, 'rolled back')
        self.assertEqual([], self.b.list())
        # The source is told of another destination than the one it finds.
        endpoint = self.b.migration_prepare(
            uuid, migration := str(uuidlib.uuid4()), spec,
            self.a.host_info()['migration'])
        endpoint['certificate'] = self.a.host_info()['migration'][
            'certificate']
        self.a.migration_begin(uuid, migration, endpoint)
        status = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')
        self.assertEqual('forbidden', status['error']['code'])
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.b.migration_abort(migration, 'rolled back')
        self.migrate(uuid, self.a, self.b)

    def test_bandwidth_limit(self):
        uuid = self.run_container()
        self.sh(self.a, uuid, 'head -c 8000000 /dev/urandom > /root/big')
        _, there = self.migrate(
            uuid, self.a, self.b, bandwidth=4 << 20)
        self.assertGreater(there['ended_at'] - there['began_at'], 1.5)
        self.assertEqual('8000000', self.sh(
            self.b, uuid, 'stat -c %s /root/big'))


class PausedTestCase(hosts.TwoHostsTestCase):

    def test_a_paused_guest_arrives_paused(self):
        uuid = self.run_container()
        self.sh(self.a, uuid, 'setsid sh -c "while :; do echo x >> /ticks; '
                'sleep 0.05; done" </dev/null >/dev/null 2>&1 &')
        # The command goes on in the background: a guest that is paused
        # before its first write has no file to look at afterwards.
        base.wait_for(lambda: self.sh(self.a, uuid, 'wc -c < /ticks || :'),
                      'the first tick')
        self.a.pause(uuid)
        self.migrate(uuid, self.a, self.b)
        self.assertEqual('paused', self.b.info(uuid)['state'])
        ticks = (self.b.directory / 'state/instances' / uuid /
                 'disk/upper/ticks')

        def size():
            return int(self.b.run('stat', '-c', '%s', str(ticks)).stdout)

        before = size()
        time.sleep(0.5)
        self.assertEqual(before, size())
        self.b.unpause(uuid)
        base.wait_for(lambda: size() > before, 'the guest to go on')


class OperatorsCaTestCase(hosts.TwoHostsTestCase):

    def _issue(self, name, address):
        """Key and certificate of a host, by the openssl command."""
        def openssl(*argv):
            subprocess.run(['openssl', *argv], check=True, timeout=60,
                           capture_output=True, cwd=self.top)

        if not (self.top / 'ca.pem').exists():
            openssl('req', '-x509', '-newkey', 'ec', '-pkeyopt',
                    'ec_paramgen_curve:P-256', '-nodes', '-keyout', 'ca.key',
                    '-out', 'ca.pem', '-subj', '/CN=ca', '-days', '30')
        (self.top / f'{name}.ext').write_text(
            f'subjectAltName=IP:{address}\n'
            'extendedKeyUsage=serverAuth,clientAuth\n')
        openssl('req', '-new', '-newkey', 'ec', '-pkeyopt',
                'ec_paramgen_curve:P-256', '-nodes', '-keyout',
                f'{name}.key', '-out', f'{name}.csr', '-subj', f'/CN={name}')
        openssl('x509', '-req', '-in', f'{name}.csr', '-CA', 'ca.pem',
                '-CAkey', 'ca.key', '-CAcreateserial', '-out', f'{name}.pem',
                '-days', '30', '-extfile', f'{name}.ext')
        return {'migration_ca': self.top / 'ca.pem',
                'migration_cert': self.top / f'{name}.pem',
                'migration_key': self.top / f'{name}.key'}

    def test_certificates_of_an_operator(self):
        for host in (self.a, self.b):
            host.restart_agent(**self._issue(host.name, host.address))
        uuid = self.run_container()
        self.migrate(uuid, self.a, self.b)
        self.assertEqual('0', self.sh(self.b, uuid, 'id -u'))
