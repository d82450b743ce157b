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

"""What this release's driver and a former one tell each other through Nova."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from nova import exception
from nova import objects
from nova.objects import base as object_base
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import migration_data
from nova_pycontainer.runtime.migration import versions
from tests.faults import releases
from tests.unit.driver import driver_base

#: The former driver, as source or destination of a live migration.
_FORMER = """
import json, sys
from nova import objects
from nova.objects import base
import nova_pycontainer
assert nova_pycontainer.__path__[0].startswith(sys.argv[1])
from nova_pycontainer import migration_checks, migration_data
objects.register_all()
serializer = base.NovaObjectSerializer()

class Agent:
    def migration_check_source(self, uuid):
        return {'facts': {'uuid': uuid, 'layer': 'x'}, 'problems': [],
                'warnings': []}

checks = object.__new__(migration_checks.Checks)
checks._client = Agent()
if sys.argv[2] == 'source':
    data = checks.source(
        objects.Instance(uuid=sys.argv[3]),
        serializer.deserialize_entity(None, json.load(sys.stdin)))
elif sys.argv[2] == 'begin':
    data = serializer.deserialize_entity(None, json.load(sys.stdin))
    print(json.dumps(migration_data.get(data)['endpoint']))
    sys.exit()
else:
    data = migration_data.create(None, None, 100)
print(json.dumps(serializer.serialize_entity(None, data)))
"""


class FormerDriverTestCase(driver_base.Base):

    def setUp(self):
        reason = releases.missing(releases.LAST)
        if reason is not None:
            print(f'skipped: {reason}')
            self.skipTest(reason)
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.former = pathlib.Path(directory.name) / 'former'
        releases.export(releases.LAST, self.former)
        self.spawn()
        self.serializer = object_base.NovaObjectSerializer()

    def told_by_former(self, role, data=None):
        done = subprocess.run(
            [sys.executable, '-c', _FORMER, str(self.former), role,
             self.instance.uuid],
            # Where it is comes first.
            cwd=self.former,
            env={**os.environ, 'PYTHONPATH': str(self.former)},
            input=json.dumps(self.serializer.serialize_entity(
                self.context, data)), stdout=subprocess.PIPE, text=True,
            check=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])

    def data_of_former(self, role, data=None):
        return self.serializer.deserialize_entity(
            self.context, self.told_by_former(role, data))

    def test_source(self):
        """A server comes from it."""
        data = migration_data.create(
            None, None, 100, **versions.told(versions.own()))
        data = self.data_of_former('source', data)
        self.assertEqual({'uuid': self.instance.uuid, 'layer': 'x'},
                         migration_data.get(data)['facts'])
        self.agent.containers.clear()
        data = self.driver.check_source_migrate_data_at_dest(
            self.context, self.instance, data,
            objects.Migration(uuid=uuids.migration), None, None)
        migration_data.put(data, migration=uuids.migration, endpoint={
            **self.agent.identity()})
        self.assertEqual(self.agent.identity(),
                         self.told_by_former('begin', data))

    def test_destination(self):
        """None goes to it."""
        error = self.assertRaises(
            exception.MigrationPreCheckError,
            self.driver.check_can_live_migrate_source, self.context,
            self.instance, self.data_of_former('destination'))
        self.assertIn('the destination in format 3', str(error))
        self.assertIn('Upgrade nova-pycontainer on the destination first',
                      str(error))
        self.assertNotIn('migration_check_source', self.agent.calls)
