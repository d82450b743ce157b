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

"""What the support matrix says is there, is there."""

import ast
import collections
import configparser
import pathlib

import testtools

ROOT = pathlib.Path(__file__).resolve().parents[2]
MATRIX = ROOT / 'doc/source/support-matrix.ini'


class SupportMatrixTestCase(testtools.TestCase):

    def setUp(self):
        super().setUp()
        self.matrix = configparser.ConfigParser(interpolation=None)
        self.matrix.read_string(MATRIX.read_text())

    def test_every_row_of_novas(self):
        self.assertEqual(59, len(self.matrix.sections()))
        for name, row in self.matrix.items():
            if name == self.matrix.default_section:
                continue
            self.assertTrue(row['title'], name)
            self.assertIn(row['support'],
                          ('complete', 'missing', 'not-applicable'), name)
            # A reason, and a proof, where they belong and nowhere else.
            self.assertEqual(
                row['support'] == 'complete', 'test' in row, name)
            if row['support'] == 'not-applicable':
                self.assertTrue(row['notes'], name)

    def test_the_counts_that_are_told(self):
        text = ' '.join((ROOT / 'doc/source/user/support-matrix.rst')
                        .read_text().split())
        counts = collections.Counter(
            self.matrix[name]['support'] for name in self.matrix.sections())
        self.assertIn(
            f'{counts["complete"]} are complete, '
            f'{counts["not-applicable"]} do not apply to containers, and '
            f'{counts["missing"]} is missing', text)

    def test_every_named_test_exists(self):
        for name in self.matrix.sections():
            test = self.matrix[name].get('test')
            if test is None:
                continue
            module, kind, method = test.rsplit('.', 2)
            tree = ast.parse(
                (ROOT / (module.replace('.', '/') + '.py')).read_text())
            found = [item.name for node in tree.body
                     if isinstance(node, ast.ClassDef) and node.name == kind
                     for item in node.body
                     if isinstance(item, ast.FunctionDef)]
            self.assertIn(method, found, f'{name}: {test}')
            # What no user does proves nothing to him.
            self.assertRegex(test, r'^tests\.(cloud|functional|runtime)\.')
