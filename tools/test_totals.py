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

"""Adds up the results of a run of tools/run_tests.sh.

    test_totals.py DIRECTORY GROUP... [--matrix FILE]

Reads DIRECTORY/<group>.subunit and DIRECTORY/checks, names each skipped and
then each failed test with its reason, and prints as the last line the totals.
Fails if a test failed, or if a group has no results at all: tests that did
not run have not passed. With a support matrix: also if a test that it names
did not run; of those that were skipped it says so.
"""

import argparse
import collections
import configparser
import pathlib
import re
import sys

import subunit
import testtools


#: Characters of a failure's reason that fit beside its name.
_LAST_WORDS = 300

#: A frame of a traceback in the tests themselves.
_PLACE = re.compile(r'File ".*?(tests/[^"]*)", line ([0-9]+)')


class _Totals(testtools.StreamResult):
    """Counts the last status of each test of a stream."""

    def __init__(self):
        super().__init__()
        self.status_of = {}
        self.reasons = {}
        self.tracebacks = {}

    def status(self, test_id=None, test_status=None, test_tags=None,
               runnable=True, file_name=None, file_bytes=None, eof=False,
               mime_type=None, route_code=None, timestamp=None):
        if test_id is None:
            return
        if test_status is not None:
            self.status_of[test_id] = test_status
        if file_name == 'reason' and file_bytes:
            self.reasons[test_id] = (
                self.reasons.get(test_id, b'') + bytes(file_bytes))
        if file_name == 'traceback' and file_bytes:
            self.tracebacks[test_id] = (
                self.tracebacks.get(test_id, b'') + bytes(file_bytes))

    def last_words(self, test_id):
        """Where in the tests it failed, and what the error says."""
        text = self.tracebacks.get(test_id, b'').decode(errors='replace')
        places = _PLACE.findall(text)
        place = ' '.join(f'{file}:{line}' for file, line in places[-2:])
        # What follows the last frame of the traceback, and is not indented.
        frame = text[text.rfind('\n  File "') + 1:]
        error = ' '.join(re.split(r'\n(?=\S)', frame, maxsplit=1)[-1].split())
        return f'{place} {error[:_LAST_WORDS]}'.strip()


def _read(path):
    totals = _Totals()
    with open(path, 'rb') as stream:
        totals.startTestRun()
        subunit.ByteStreamToStreamResult(
            stream, non_subunit_name='stdout').run(totals)
        totals.stopTestRun()
    return totals


def _check_matrix(path, status_of, counts):
    """What the matrix calls complete, and what of it this run has shown.

    :param status_of: test → its status
    :returns: lines to print
    """
    matrix = configparser.ConfigParser(interpolation=None)
    matrix.read_string(path.read_text())
    named = {name: row['test'] for name, row in matrix.items()
             if 'test' in row}
    shown = [name for name, test in named.items()
             if status_of.get(test) == 'success']
    lines = []
    for name, test in named.items():
        if test not in status_of:
            counts['failed'] += 1
            lines.append(f'FAILED support matrix: {name}: {test} did not run')
        elif status_of[test] == 'skip':
            lines.append(f'NOT SHOWN HERE {name}: {test} was skipped')
    return [*lines, f'support matrix: {len(named)} complete, {len(shown)} '
            'of them shown in this run']


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument('directory', type=pathlib.Path)
    parser.add_argument('groups', nargs='*')
    parser.add_argument('--matrix', type=pathlib.Path)
    args = parser.parse_args(argv[1:])
    directory = args.directory
    counts = collections.Counter()
    lines = []
    statuses = {}
    for group in args.groups:
        if group == 'pep8':
            continue
        path = directory / f'{group}.subunit'
        totals = _read(path) if path.exists() else _Totals()
        statuses.update(totals.status_of)
        ran = 0
        for test, status in sorted(totals.status_of.items()):
            if status == 'exists':
                continue
            ran += 1
            if status in ('success', 'xfail'):
                counts['passed'] += 1
            elif status == 'skip':
                counts['skipped'] += 1
                reason = totals.reasons.get(test, b'no reason given')
                lines.append(f'SKIPPED {test}: '
                             f'{reason.decode(errors="replace").strip()}')
            else:
                # A test that began and never ended ("inprogress") among them.
                counts['failed'] += 1
                lines.append(f'FAILED {test} ({status}) '
                             f'{totals.last_words(test)}'.rstrip())
        if not ran:
            counts['failed'] += 1
            lines.append(f'FAILED {group}: no test ran')
    checks = directory / 'checks'
    if checks.exists():
        for line in checks.read_text().splitlines():
            status, _, name = line.partition(' ')
            counts[status] += 1
            if status == 'failed':
                lines.append(f'FAILED {name}')
    if args.matrix:
        lines += _check_matrix(args.matrix, statuses, counts)
    # What failed stands at the end: the last lines of a log are what is kept
    # and what is read.
    for line in sorted(lines, key=lambda line: line.startswith('FAILED ')):
        print(line)
    print(f'{counts["passed"]} passed, {counts["failed"]} failed, '
          f'{counts["skipped"]} skipped')
    return 1 if counts['failed'] else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
