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

import json
import pathlib
import tempfile

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import state
from tests import cases


class UpgradesTestCase(cases.TestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name, 'state.json')

    def read(self, **data):
        self.path.write_text(json.dumps(data))
        return state.read_json(self.path)

    def test_every_former_format(self):
        for number in range(1, state.FORMAT + 1):
            self.assertEqual({'format': state.FORMAT, 'x': 1},
                             self.read(format=number, x=1))

    def test_resume_of_format_3(self):
        for number in 1, 2, 3:
            self.assertEqual(
                {'phase': 'undecided', 'at': 5},
                self.read(format=number, suspended={
                    'phase': 'restoring', 'at': 5})['suspended'])
        for suspended in (None, 'x', {}, {'phase': 'saved', 'at': 5},
                          {'phase': 'resumed'}):
            self.assertEqual(suspended, self.read(
                format=3, suspended=suspended)['suspended'])
        self.assertEqual('restoring', self.read(
            format=4, suspended={'phase': 'restoring'})['suspended']['phase'])

    def test_later_format(self):
        error = self.assertRaises(
            errors.ContainerError, self.read, format=state.FORMAT + 1)
        self.assertEqual('unsupported', error.code)
        self.assertIn(f'has format {state.FORMAT + 1}', error.message)
        self.assertIn('newer one', error.remedy)
