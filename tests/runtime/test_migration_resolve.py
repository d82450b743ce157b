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

"""A human settles a migration whose other host does not come back."""

import subprocess

from nova_pycontainer.runtime import errors
from tests import cases
from tests.runtime import base
from tests.runtime import hosts
from tests.runtime import test_migration_faults


class ResolveTestCase(test_migration_faults.Helpers):

    def resolve(self, host, uuid, where):
        """As an administrator does."""
        return host.run(
            hosts.BIN / 'pycontainer', '--socket', '/run/pyc/agent.sock',
            'migration', 'resolve', uuid, f'--{where}', '--yes',
            check=False, stderr=subprocess.PIPE, timeout=200)

    def _resolved(self, host, uuid, where):
        done = self.resolve(host, uuid, where)
        self.assertEqual(0, done.returncode, done.stderr + self.logs())

    def _refused(self, host, uuid, where, why):
        done = self.resolve(host, uuid, where)
        self.assertEqual(1, done.returncode, done.stdout)
        self.assertIn(why, done.stderr)

    def _committed(self, restart=False):
        """The source has given it away, and does not hear any more of it.

        :param restart: the source's agent dies too
        """
        self.b.restart_agent('destination.go=kill')
        uuid = self._boot()
        self._try(uuid)
        self._died(self.b)
        if restart:
            self.a.restart_agent()
        base.wait_for(lambda: self._error(uuid), 'the source to say so')
        self.assertEqual([], self._where(uuid))
        return uuid

    def _error(self, uuid):
        """What the source says of a migration that waits."""
        migration = self.a.info(uuid)['migration']
        error = migration and self.a.migration_status(migration)['error']
        return error and error['remedy']

    def test_the_source_runs_it(self):
        for restart in cases.some((False, True), 0):
            uuid = self._committed(restart)
            self.assertIn('pycontainer migration', self._error(uuid))
            if restart:
                # Nothing else can be done with it.
                error = self.assertRaises(
                    errors.ContainerError, self.a.delete, uuid)
                self.assertEqual('bad_state', error.code)
            before = self._count(self.a, uuid)
            self._resolved(self.a, uuid, 'here')
            self._settled(uuid, ['a'])
            self.assertGreater(self._count(self.a, uuid), before)
            # What the other host has of it is frozen, and goes.
            self.b.restart_agent()
            self._check_clean(self.b, uuid)
            self._settled(uuid, ['a'])
            self.migrate(uuid, self.a, self.b)
            self._settled(uuid, ['b'])
            self.b.delete(uuid)
            self.a.delete(uuid)

    def test_the_destination_answers(self):
        uuid = self._committed()
        self.b.restart_agent()
        # One of the two agents has settled it by now, or is about to.
        for host, where in ((self.a, 'here'), (self.b, 'here')):
            self._refused(host, uuid, where, 'it does not wait'
                          if self._where(uuid) else 'answers')
        self._settled(uuid, ['b'])

    def test_the_source_gives_it_up(self):
        uuid = self._committed()
        self._resolved(self.a, uuid, 'elsewhere')
        self.assertEqual('stopped', self.a.info(uuid)['state'])
        self.assertRaises(errors.ContainerError, self.a.prepare, uuid)
        self.assertEqual([], self._where(uuid))
        self.a.delete(uuid)
        # All that there is of it is there.
        self.b.restart_agent()
        self._settled(uuid, ['b'])

    def _ready(self):
        """The destination has it, frozen, and does not hear of its source."""
        self.a.restart_agent('source.committed=kill')
        uuid = self._boot()
        self._try(uuid)
        self._died(self.a)
        base.wait_for(lambda: self.b.info(uuid)['migration'],
                      'the destination to have it')
        return uuid

    def test_the_destination_runs_it(self):
        for restart in cases.some((False, True), 0):
            uuid = self._ready()
            if restart:
                self.b.restart_agent()
            self._resolved(self.b, uuid, 'here')
            self._settled(uuid, ['b'])
            # The source learns that it has gone.
            self.a.restart_agent()
            base.wait_for(
                lambda: self.a.info(uuid)['state'] == 'stopped',  # noqa: B023
                'the source to know')
            self._settled(uuid, ['b'])
            self.a.delete(uuid)
            self.b.delete(uuid)

    def test_the_destination_gives_it_up(self):
        uuid = self._ready()
        self._resolved(self.b, uuid, 'elsewhere')
        self.assertEqual([], self.b.list())
        self.a.restart_agent()
        self._settled(uuid, ['a'])

    def test_the_source_is_there(self):
        uuid = self._boot()
        self._refused(self.a, uuid, 'here', 'does not wait')
        self.b.restart_agent('destination.asked=sleep:15')
        self.prepare_migration(uuid, self.a, self.b)
        base.wait_for(lambda: self.b.info(uuid)['migration'] and (
            self.b.migration_status(self.b.info(uuid)['migration'])[
                'phase'] == 'ready'), 'the destination to be ready')
        self._refused(self.b, uuid, 'here', 'the source is there')
        self._settled(uuid, ['b'])
