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

"""What is left of a migration that has ended, and passes that have not."""

import json
import sys
import time

from tests.runtime import base
from tests.runtime import test_migration_faults as faults

#: Dials as the source's agent would, and prints what comes of it.
DIAL = '''
import json, sys
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import question
directory, there, migration, uuid, role = sys.argv[1:]
there = json.loads(there)
try:
    with channel.connect(
            there["address"], there["port"],
            keys.Identity.load_or_create(directory, "x"),
            question.peer(there), channel.Hello(migration, uuid, role, 77),
            20):
        print("accepted")
except errors.ContainerError as e:
    print(e.code)
'''


class EndsTestCase(faults.Helpers):

    # Connections of what has ended

    def dial(self, migration, uuid, role):
        there = self.b.host_info()['migration']
        return self.a.run(
            sys.executable, '-c', DIAL,
            str(self.a.directory / 'state' / 'keys'), json.dumps(there),
            migration, uuid, role).stdout.strip()

    def test_none_after_a_failure(self):
        self.a.restart_agent('source.pass=raise')
        uuid = self._boot()
        migration = self.prepare_migration(uuid, self.a, self.b)
        base.wait_for(lambda: self._ended(self.a, migration), 'the end')
        self._check_clean(self.b, uuid)
        for role in ('control', 'upper', 'images', 'pages', 'layer'):
            self.assertEqual('forbidden', self.dial(migration, uuid, role))

    def test_none_after_an_abort(self):
        go = self.top / 'go'
        self.a.restart_agent(f'source.pass=wait:{go}')
        uuid = self._boot()
        migration = self.prepare_migration(uuid, self.a, self.b)
        self.b.migration_abort(migration, 'rolled back')
        go.touch()
        self.assertEqual('forbidden', self.dial(migration, uuid, 'control'))
        # Which was never begun.
        endless = self.run_container()
        self.b.migration_abort(self._prepared(endless), 'rolled back')
        self.assertEqual([], self.b.list())

    def test_its_guest_ends(self):
        """A reboot does not wait for the end of the copy, nor do those who
        look at other containers.
        """
        self.a.restart_agent('source.pass=sleep:20')
        uuid = self._boot()
        migration = self.prepare_migration(uuid, self.a, self.b)
        pid = self.a.info(uuid)['pid']
        self.sh(self.a, uuid, 'setsid sh -c "sleep 0.2; reboot -f" '
                '</dev/null >/dev/null 2>&1 &')
        base.wait_for(lambda: self.a.info(uuid)['pid'] != pid, 'the end')
        began = time.monotonic()
        while self.a.info(uuid)['state'] == 'ending':
            self.assertEqual([uuid], [i['uuid'] for i in self.a.list()])
        status = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')
        print('ended after', time.monotonic() - began)
        self.assertEqual('aborted', status['phase'])
        self.assertIn('its init has ended', str(status['error']))
        base.wait_for(lambda: self.a.info(uuid)['pid'] not in (pid, None),
                      'the reboot')
        self._check_clean(self.b, uuid)

    def _prepared(self, uuid):
        migration = '11111111-2222-3333-4444-555555555555'
        info = self.a.info(uuid)
        self.b.migration_prepare(
            uuid, migration, {**info['spec'], 'base_id': info['base_id']},
            self.a.host_info()['migration'])
        return migration

    def test_only_questions_after_a_success(self):
        """The source may not have heard that its guest runs."""
        uuid = self._boot()
        migration = self.prepare_migration(uuid, self.a, self.b)
        self.finish_migration(uuid, migration, self.a, self.b)
        for role in ('upper', 'images', 'pages', 'layer'):
            self.assertEqual('forbidden', self.dial(migration, uuid, role))
        self.assertEqual('accepted', self.dial(migration, uuid, 'control'))
        self.sh(self.b, uuid, 'true')

    # Passes

    def test_incomplete_pass_is_not_the_last(self):
        """Else what it left out is copied while the guest stands still."""
        uuid = self._boot()
        # They are sent in this order; the second vanishes meanwhile.
        self.sh(self.a, uuid, 'mkdir /d; '
                'dd if=/dev/urandom of=/d/a bs=1M count=12; '
                'dd if=/dev/urandom of=/d/b bs=1M count=1')
        migration = self.prepare_migration(
            uuid, self.a, self.b, bandwidth=4 << 20, max_passes=1)
        path = self.b.directory / 'state/instances' / uuid / 'disk/upper/d'
        base.wait_for(lambda: not self.b.run(
            'ls', str(path / 'a'), check=False, stderr=-3).returncode,
            'the first file')
        self.sh(self.a, uuid, 'rm /d/b')
        there, _here = self.finish_migration(
            uuid, migration, self.a, self.b)
        self.assertIn('a pass over the files was incomplete',
                      self.b.log.read_text())
        # It, another one, and the last.
        self.assertEqual(3, there['passes'])
        self.sh(self.b, uuid, 'test -e /d/a && ! test -e /d/b')
