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


"""Every step of the package is in the matrix of faults."""

import ast
import re
import unittest

from tests.faults import cloud
from tests.faults import points

#: What hands on a name that it was given.
_FORWARDING = ('faults.point(name)', "super().step(f'{self._verb}.{name}'")

#: Of verbs that are not in the matrix: modules, and steps of others.
_OTHER = {
    'rescue.py', 'snapshot.py', 'volume.py', 'volume_swap.py',
    # A start, and a reboot.
    ('power.py', 'prepare'), ('power.py', 'start'),
    # An interface that comes later.
    ('spawn.py', 'attach'), ('spawn.py', 'metadata'),
}


class TestFaultPoints(unittest.TestCase):

    def test_all_are_listed(self):
        """As many as a search in the text finds, which knows no syntax."""
        found = 0
        for path in points.PACKAGE.rglob('*.py'):
            for line in path.read_text().splitlines():
                if any(text in line for text in _FORWARDING):
                    continue
                for call in re.findall(
                        r"faults\.point\(('.*)\)|\.step\('[a-z_-]+'", line):
                    found += call.count("' if ") + 1
        listed = points.listed()
        self.assertEqual(found, len(listed))
        self.assertGreater(found, 50)

    def test_groups(self):
        migration = points.names('migration')
        self.assertIn('source.committed', migration)
        # Of two, by a condition.
        self.assertIn('source.pass', migration)
        self.assertIn('source.final-pass', migration)
        self.assertIn('mount-root', points.names('life'))
        self.assertIn('delete.killed', points.names('life'))
        self.assertIn('vif_wait', points.names('driver'))
        self.assertIn('suspend.saved', points.names('verbs'))
        # The matrix names a step by its name alone.
        self.assertEqual(
            set(), set(migration) & set(points.names('life')))

    def test_steps_in_nova_compute(self):
        """A new one is a row of the cloud's matrix, or of a verb that is not
        in it.
        """
        have = {step for verb in cloud.verbs().values()
                for step in verb.driver}
        for step in points.listed('driver'):
            if (step.module, step.name) in _OTHER or step.module in _OTHER:
                continue
            verb = cloud.MODULES[step.module]
            self.assertIn(f'{verb}.{step.name}', have)

    def test_phases_of_the_cloud(self):
        for verb, steps in cloud.PHASES.items():
            self.assertEqual(
                set(), set(steps) - set(cloud.verbs()[verb].agent))

    def test_a_name_is_written_at_the_step(self):
        call = ast.parse('faults.point(prefix + name)').body[0].value
        self.assertRaises(points.UnknownName, points._names, call.args[0])
