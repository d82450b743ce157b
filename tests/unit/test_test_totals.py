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

"""The totals of a test run: nothing that did not pass counts as passed."""

import contextlib
import importlib.util
import io
import pathlib
import tempfile
import unittest

import subunit

_PATH = pathlib.Path(__file__).parents[2] / 'tools/test_totals.py'


def _module():
    spec = importlib.util.spec_from_file_location('test_totals', _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestTotals(unittest.TestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def write(self, group, **statuses):
        with open(self.directory / f'{group}.subunit', 'wb') as file:
            stream = subunit.StreamResultToBytes(file)
            stream.startTestRun()
            for test, status in statuses.items():
                stream.status(test_id=test, test_status='inprogress')
                if status == 'skip':
                    stream.status(
                        test_id=test, file_name='reason', eof=True,
                        mime_type='text/plain; charset="utf8"',
                        file_bytes=b'for a reason', test_status=status)
                elif status != 'inprogress':
                    stream.status(test_id=test, test_status=status)
            stream.stopTestRun()

    def run_totals(self, *groups):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = _module().main(['totals', str(self.directory), *groups])
        return code, output.getvalue().splitlines()

    def test_passed(self):
        self.write('unit', a='success', b='success', c='xfail')
        self.assertEqual(
            (0, ['3 passed, 0 failed, 0 skipped']), self.run_totals('unit'))

    def test_skips_are_named(self):
        self.write('unit', a='success', b='skip')
        self.assertEqual(
            (0, ['SKIPPED b: for a reason', '1 passed, 0 failed, 1 skipped']),
            self.run_totals('unit'))

    def test_failures_of_all_groups(self):
        self.write('unit', a='success', b='fail')
        self.write('cloud', c='success', d='uxsuccess')
        self.assertEqual(
            (1, ['FAILED b (fail)', 'FAILED d (uxsuccess)',
                 '2 passed, 2 failed, 0 skipped']),
            self.run_totals('unit', 'cloud'))

    def test_where_and_why_it_failed(self):
        with open(self.directory / 'unit.subunit', 'wb') as file:
            stream = subunit.StreamResultToBytes(file)
            stream.startTestRun()
            stream.status(
                test_id='a', test_status='fail', file_name='traceback',
                mime_type='text/plain; charset="utf8"', eof=True,
                file_bytes=b"""Traceback (most recent call last):
  File "/root/clone/tests/functional/test_a.py", line 12, in test_a
    self.assertEqual({}, found)
  File "/usr/lib/python3/site-packages/testtools/x.py", line 3, in y
    raise mismatch_error
testtools.matchers._impl.MismatchError: !=:
reference = {}
actual    = {'a':
             {'b': 1}}
== the agent's log
""")
            stream.stopTestRun()
        self.assertEqual(
            "FAILED a (fail) tests/functional/test_a.py:12 "
            "testtools.matchers._impl.MismatchError: !=: reference = {} "
            "actual = {'a': {'b': 1}} == the agent's log",
            self.run_totals('unit')[1][0])

    def test_support_matrix(self):
        matrix = self.directory / 'matrix.ini'
        matrix.write_text(
            '[one]\ntest = a\n[two]\ntest = b\n[three]\nnotes = none\n')
        self.write('unit', a='success', b='skip')
        code, lines = self.run_totals('unit', '--matrix', str(matrix))
        self.assertEqual((0, 'support matrix: 2 complete, 1 of them shown in '
                          'this run'), (code, lines[-2]))
        self.write('unit', a='success')
        code, lines = self.run_totals('unit', '--matrix', str(matrix))
        self.assertEqual(1, code)
        self.assertIn('FAILED support matrix: two: b did not run', lines)

    def test_a_test_that_never_ended_has_failed(self):
        self.write('unit', a='success', b='inprogress')
        self.assertEqual(
            (1, ['FAILED b (inprogress)', '1 passed, 1 failed, 0 skipped']),
            self.run_totals('unit'))

    def test_a_group_without_tests_has_failed(self):
        self.write('unit')
        self.assertEqual(
            (1, ['FAILED unit: no test ran', 'FAILED cloud: no test ran',
                 '0 passed, 2 failed, 0 skipped']),
            self.run_totals('unit', 'cloud'))

    def test_checks(self):
        (self.directory / 'checks').write_text(
            'passed pep8.mypy\nfailed leaks\n')
        self.assertEqual(
            (1, ['FAILED leaks', '1 passed, 1 failed, 0 skipped']),
            self.run_totals('pep8'))
