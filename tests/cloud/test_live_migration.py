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

"""Live migration as operators and users see it."""

import json
import time
import typing

from openstack import exceptions
from testtools import content

from tests import cases
from tests.cloud import base
from tests.cloud import migration_base
from tests.cloud import sessions

PATIENCE = migration_base.PATIENCE


class LiveMigrationTest(migration_base.MigrationTestCase):

    def debian(self, name: str) -> typing.Any:
        server = self.create_server('debian13', host='host1', name=name)
        server.floating = self.floating_ip(server)
        self.wait_ssh(server.floating, user='debian')
        return server

    def session(self, server: typing.Any) -> sessions.Session:
        session = sessions.Session(server.floating)
        self.addCleanup(session.finish)
        base.wait_for(session.come, PATIENCE, 'the session talks')
        return session

    # Migrations

    def migrate(self, server: typing.Any, *options: str) -> None:
        self.cli('server', 'migrate', '--live-migration', *options,
                 server.id, user='admin')

    def move(self, server: typing.Any, *options: str) -> None:
        """Migrate it, as an operator types it, to the other host."""
        before = self.host_of(server)
        after = next(host for host in base.HOSTS if host != before)
        began = time.monotonic()
        self.migrate(server, '--wait', *options)
        took = time.monotonic() - began
        self.wait_migration(server, 'completed')
        self.assert_at(server, after)
        self.addDetail(f'{before} to {after}', content.text_content(
            f'{took:.1f} s for the command'))

    def slow(self) -> None:
        """Let migrations from host1 take long enough to be watched."""
        def set_bandwidth(value):
            self.on_host(
                'host1', 'sh', '-c',
                'sed -i "/^live_migration_bandwidth/d" /etc/nova/nova.conf; '
                + (f'sed -i "s/^\\[pycontainer\\].*/&\\n'
                   f'live_migration_bandwidth = {value}/" '
                   '/etc/nova/nova.conf; '
                   'grep -q "^live_migration_bandwidth" /etc/nova/nova.conf'
                   if value else 'true'))
            self.restart_compute('host1')

        self.addCleanup(set_bandwidth, 0)
        set_bandwidth(8)

    def fill(self, server: typing.Any, mib: int) -> None:
        self.ssh(server.floating, 'sudo dd if=/dev/urandom of=/root/filling '
                 f'bs=1M count={mib} status=none', user='debian')

    # What works

    def test_there_and_back(self):
        server = self.debian('there-and-back')
        session = self.session(server)
        self.ssh(server.floating, 'sudo sh -c "sleep 86421 >&- 2>&- & '
                 'echo \\$! > /root/pid; echo before > /root/file"',
                 user='debian')
        self.move(server)
        self.move(server, '--host', 'host1')
        self.ssh(server.floating, 'sudo sh -c "grep before /root/file && '
                 'grep sleep /proc/\\$(cat /root/pid)/comm"', user='debian')
        self.assertIn(server.id, self.ssh(
            server.floating, 'curl -s http://169.254.169.254/openstack/'
            'latest/meta_data.json', user='debian'))
        session.come()
        base.wait_for(session.come, PATIENCE, 'the session still talks')
        self.assertEqual('', session.finish())
        self.addDetail('longest silence of the session', content.text_content(
            f'{session.longest:.3f} s'))
        # It is a server as any other.
        self.demo.compute.reboot_server(server.id, 'HARD')
        self.wait_server(server.id, 'ACTIVE')
        self.wait_ssh(server.floating, user='debian')

    def test_config_drive(self):
        server = self.create_server(
            'debian13', host='host1', name='with-drive', config_drive=True)
        server.floating = self.floating_ip(server)
        self.wait_ssh(server.floating, user='debian')
        self.move(server)
        self.assertIn(server.id, self.ssh(
            server.floating, 'sudo cat /config-drive/openstack/latest/'
            'meta_data.json', user='debian'))

    def test_paused(self):
        server = self.debian('paused')
        session = self.session(server)
        self.demo.compute.pause_server(server.id)
        self.wait_server(server.id, 'PAUSED')
        # The client's --wait is for ACTIVE.
        self.migrate(server)
        self.wait_migration(server, 'completed')
        self.assert_at(server, 'host2', 'PAUSED')
        session.come()
        self.assertFalse(session.come())
        self.demo.compute.unpause_server(server.id)
        self.wait_server(server.id, 'ACTIVE')
        base.wait_for(session.come, PATIENCE, 'the session goes on')
        self.assertEqual('', session.finish())

    # Control

    def test_abort(self):
        server = self.debian('abort')
        self.slow()
        session = self.session(server)
        self.fill(server, 300)
        self.migrate(server, '--host', 'host2')
        migration = self.wait_migration(server, 'running')
        shown = self.running(server)
        self.assertEqual(migration.id, shown['id'])
        self.cli('server', 'migration', 'abort', server.id,
                 str(migration.id), user='admin')
        self.wait_migration(server, 'cancelled')
        self.assertIn('aborted by the operator', self.reasons(server))
        self.assert_at(server, 'host1')
        session.come()
        base.wait_for(session.come, PATIENCE, 'the session still talks')
        self.assertEqual('', session.finish())

    def running(self, server: typing.Any) -> dict[str, typing.Any]:
        """Its migration with the progress, once there is some."""
        def found():
            answer = self.admin.compute.get(
                f'/servers/{server.id}/migrations', microversion='2.80')
            for migration in answer.json()['migrations']:
                if migration['memory_total_bytes']:
                    return migration
            return None

        return base.wait_for(found, PATIENCE, 'progress is shown')

    def test_force_complete(self):
        server = self.debian('force-complete')
        self.slow()
        session = self.session(server)
        self.fill(server, 100)
        self.migrate(server, '--host', 'host2')
        migration = self.wait_migration(server, 'running')
        self.cli('server', 'migration', 'force', 'complete', server.id,
                 str(migration.id), user='admin')
        self.wait_migration(server, 'completed')
        self.assert_at(server, 'host2')
        self.assertEqual('', session.finish())

    @cases.more
    def test_nova_compute_restarts(self):
        server = self.debian('restart')
        self.slow()
        session = self.session(server)
        self.fill(server, 200)
        self.migrate(server, '--host', 'host2')
        self.wait_migration(server, 'running')
        self.running(server)
        self.kill('host1.nova-compute')
        self.restart_compute('host1')
        self.wait_migration(server, 'completed')
        self.assert_at(server, 'host2')
        self.assertEqual('', session.finish())

    @cases.more
    def test_deleted_meanwhile(self):
        server = self.debian('deleted')
        self.slow()
        self.fill(server, 200)
        self.migrate(server, '--host', 'host2')
        self.wait_migration(server, 'running')
        self.running(server)
        self.delete_server(server.id)
        for host in base.HOSTS:
            self.wait_gone_from(host, server)

    # Failures

    def fails(self, server: typing.Any, statuses: tuple[str, ...],
              *words: str) -> None:
        """A migration that fails hurts nobody, and says why."""
        session = self.session(server)
        self.migrate(server, '--host', 'host2')
        self.wait_migration(server, *statuses)
        said = self.reasons(server)
        for word in words:
            self.assertIn(word, said)
        self.addDetail('what it said', content.text_content(said))
        self.assert_at(server, 'host1')
        session.come()
        base.wait_for(session.come, PATIENCE, 'the session still talks')
        self.assertEqual('', session.finish())

    @cases.more
    def test_prepare_fails(self):
        server = self.debian('prepare-fails')
        # Something else is in its place.
        place = f'/var/lib/pycontainer/instances/{server.id}'
        self.on_host('host2', 'touch', place)
        try:
            self.fails(server, ('error', 'failed'), 'is there already')
        finally:
            self.on_host('host2', 'rm', '-f', place)
        self.move(server)

    @cases.more
    def test_restore_fails(self):
        server = self.debian('restore-fails')
        # Too few for any guest.
        limit = self.pids_limit('host2')
        before = self.on_host('host2', 'cat', limit).strip()
        try:
            self.on_host('host2', 'sh', '-c', f'echo 3 > {limit}')
            self.fails(server, ('failed',), 'cannot be restored')
        finally:
            self.on_host('host2', 'sh', '-c', f'echo {before} > {limit}')
        self.move(server)

    def pids_limit(self, host: str) -> str:
        return self.on_host(
            host, 'sh', '-c', 'ls /sys/fs/cgroup/pycontainer-*/pids.max '
            f'/run/cgroup1/*/pycontainer-{host}/pids.max 2>/dev/null | '
            f'grep {host} | head -n 1').strip()

    def test_no_agent_there(self):
        server = self.debian('no-agent')
        self.kill('host2.agent')
        # The scheduler has the destination asked, and takes another one.
        self.refused(server, 'No valid host', '--host', 'host2')
        self.wait_migration(server, 'error')
        self.assertIn('agent', self.reasons(server))

    def refused(self, server: typing.Any, words: str, *options: str) -> None:
        """The API says at once that it will not be done, and why."""
        error = self.assertRaises(
            base.CommandError, self.migrate, server, *options)
        self.assertIn(words, str(error))
        now = self.wait_server(server.id, 'ACTIVE')
        self.assertEqual('host1', now.compute_host)

    def test_no_shared_storage(self):
        server = self.debian('shared-storage')
        self.refused(server, 'not on shared storage', '--host', 'host2',
                     '--shared-migration')

    def test_users_may_not(self):
        server = self.create_server('busybox', 'pyc.tiny')
        self.assertRaises(
            exceptions.ForbiddenException,
            self.demo.compute.live_migrate_server, server.id)

    # The carrier of the certificates

    def test_certificates_are_in_the_database(self):
        found = {}
        for host in base.HOSTS:
            answer = self.admin.compute.get(
                '/os-hypervisors/detail?hypervisor_hostname_pattern=' + host,
                microversion='2.53').json()
            info = answer['hypervisors'][0]['cpu_info']
            if isinstance(info, str):
                info = json.loads(info)
            found[host] = info['migration']['certificate']
            self.assertIn('BEGIN CERTIFICATE', found[host])
            self.assertNotIn('PRIVATE', found[host])
        self.assertEqual(2, len(set(found.values())))
