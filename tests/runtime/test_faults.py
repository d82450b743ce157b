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


"""A selection of the matrix of faults; ``python -m tests.faults`` runs all.

Two hosts serve all rows of a test, as they would in production.
"""

from tests.faults import rig


class FaultsTestCase(rig.Rig):

    def try_all(self, mode, *rows):
        """:param rows: step, fault, and what has to become of the guest"""
        for step, fault, outcome in rows:
            found = self.row(mode, step, fault)
            print(mode, step, fault, found)
            self.assertIn(found, outcome.split('|'), f'{step} {fault}')

    def test_a_good_run_passes_every_step(self):
        """So that each is really tried by its rows."""
        self.addCleanup(lambda: self.stop_watching())
        uuid = self.boot()
        self.migrate(uuid, self.a, self.b)
        self.b.delete(uuid)
        passed = set(self.passed())
        self.assertEqual(
            set(), {*rig.steps('move'), *rig.steps('life')} - passed)

    def test_locks_of_a_database(self):
        """They are taken again: else its client dies when another process
        opens it.
        """
        uuid = self.boot()
        self.addCleanup(lambda: self.stop_watching())
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.check_database(self.a)
        self.check_busy(self.a)
        self.migrate(uuid, self.a, self.b)
        self.check_database(self.b)
        self.check_busy(self.b)

    def test_before_the_commit(self):
        self.try_all(
            'move',
            ('layer.fetching', 'agent-b', 'source'),
            # Killed when it has done all, it is not missed.
            ('destination.prepared', 'copier-a', 'source|destination'),
            ('source.final-pass', 'disk-b', 'source|destination'),
            ('source.dumped', 'criu-a', 'source|destination'),
            ('destination.restored', 'criu-b', 'source'),
            ('destination.ready', 'link-1s', 'destination'))

    def test_after_the_commit(self):
        self.try_all(
            'move',
            ('source.committed', 'criu-a', 'destination'),
            ('destination.committed', 'agents', 'destination'),
            ('destination.running', 'fails', 'destination'))

    def test_messages(self):
        """A peer that repeats itself, or says something else."""
        self.try_all(
            'move',
            ('destination.pass', 'twice-b', 'source'),
            ('source.dumped', 'nonsense-a', 'source'),
            ('destination.ready', 'twice-b', 'destination'),
            ('source.committed', 'garbage-a', 'destination'))

    def test_post_copy(self):
        self.try_all(
            'post-copy',
            ('source.frozen', 'agent-a', 'source'),
            ('destination.resumed', 'pages', 'lost'),
            ('destination.resumed', 'agent-b', 'lost'))

    def test_cold(self):
        self.try_all(
            'cold',
            ('offer.serving', 'power-a', 'came with the second try'),
            ('taking.files', 'agent-b', 'came with the second try'),
            ('taking.written', 'link-1s', 'came'))

    def test_life(self):
        self.try_all(
            'life',
            ('disk', 'disk-a', 'failed'),
            ('create', 'disk-a', 'failed'),
            ('record', 'agent-a', 'failed'),
            ('start.running', 'agent-a', 'failed'),
            ('delete.killed', 'agent-a', 'failed'))

    def test_power(self):
        self.try_all(
            'move',
            ('source.frozen', 'power-a', 'ended on source'),
            ('source.ready', 'power-b', 'source'),
            ('destination.committed', 'power-a', 'destination'),
            ('destination.committed', 'power', 'ended on destination'))

    def test_suspend(self):
        self.try_all(
            'suspend',
            ('suspend.frozen', 'agent-a', 'running, failed'),
            ('suspend.saved', 'power-a', 'suspended, failed'),
            ('resume.restored', 'criu-a',
             'suspended, failed|running, failed|running, done'))
