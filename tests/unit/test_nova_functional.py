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

"""The verdict on Nova's own tests: a failure nobody expected is one, and so
is a success nobody expected."""

import pathlib
import tempfile
import unittest

from tests.novafunctional import results

_LIST = """
# a comment
test_x.Some.test_one: it is not ours
test_y.*: there is none of it
"""


class TestVerdict(unittest.TestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name) / 'expected'
        self.path.write_text(_LIST)

    def verdict(self, **outcomes):
        return results.Verdict(
            [{'id': results.PREFIX + ident.replace('__', '.'),
              'outcome': outcome, 'reason': 'AssertionError: what it says'}
             for ident, outcome in outcomes.items()],
            results.Expected(self.path))

    def test_good(self):
        verdict = self.verdict(
            test_x__Some__test_one='failed', test_x__Some__test_two='passed',
            test_y__Other__test_z='failed', test_z__A__test='skipped')
        self.assertTrue(verdict.good)
        self.assertIn('1 passed, 2 failed as expected, 1 skipped, 0 failed',
                      verdict.summary())
        table = verdict.table()
        self.assertIn('``test_one``: it is not ours', table)
        self.assertIn('1 of 4 tests passed', table)

    def test_unexpected_failure(self):
        verdict = self.verdict(test_x__Some__test_two='failed')
        self.assertFalse(verdict.good)
        self.assertIn('FAILED test_x.Some.test_two: AssertionError: what it '
                      'says', verdict.summary())

    def test_unexpected_success(self):
        verdict = self.verdict(test_x__Some__test_one='passed')
        self.assertFalse(verdict.good)
        self.assertIn('PASSED, BUT WAS TO FAIL test_x.Some.test_one',
                      verdict.summary())

    def test_every_failure_has_a_reason(self):
        self.path.write_text('test_x.Some.test_one\n')
        self.assertRaises(ValueError, results.Expected, self.path)

    def test_lists(self):
        """Ours can be read, and nobody expects what is not run."""
        classes = results.classes()
        self.assertEqual(len(classes), len(set(classes)))
        expected = results.Expected()
        for pattern in expected.patterns():
            self.assertTrue(
                any(pattern.startswith(name) or name.startswith(
                    pattern.rstrip('*')) for name in classes), pattern)
