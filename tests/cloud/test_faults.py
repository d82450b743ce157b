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

"""A selection of the cloud's faults; ``python -m tests.faults.cloud`` runs
all.
"""

from tests import cases
from tests.faults import cloud


class FaultsTest(cloud.Rig):

    def try_all(self, *rows):
        """:param rows: verb, step, fault, and what has to become of it"""
        for verb, step, fault, outcome in rows:
            found = self.row(verb, step, fault)
            print(verb, step, fault, found)
            self.assertEqual(outcome, found.split(' (')[0], f'{step} {fault}')

    def test_nova_compute_is_killed(self):
        self.try_all(*cases.some((
            ('migrate', 'source.committed', 'novas', 'destination'),
            ('migrate', 'destination.restored', 'power-a', 'source'),
            ('delete', 'delete.killed', 'nova-a', 'deleted')), 0))

    @cases.more
    def test_nova_compute_is_killed_elsewhere(self):
        self.try_all(
            ('migrate', 'source.frozen', 'nova-a', 'destination'),
            ('migrate', 'source.committed', 'power-b', 'source'),
            ('migrate', 'destination.restored', 'disk-b', 'source'),
            ('spawn', 'spawn.start', 'own', 'error'))
