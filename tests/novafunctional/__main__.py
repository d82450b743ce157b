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

"""Runs Nova's own functional tests with this driver."""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import unittest

import tests.novafunctional  # noqa: F401
from tests.novafunctional import results

#: Less than this is left to a test that takes as long as our slowest.
_LIMIT = 150


def _idents(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _idents(test)
        else:
            yield test.id()


def _selected(patterns):
    """The ids of the tests in the list that match one of the patterns."""
    loader = unittest.TestLoader()
    found = []
    for name in results.classes():
        found += sorted(_idents(loader.loadTestsFromName(
            results.PREFIX + name)))
    if loader.errors:
        raise SystemExit('\n'.join(loader.errors))
    return [ident for ident in found if not patterns or any(
        re.search(pattern, ident) for pattern in patterns)]


def _read(directory):
    path = directory / 'results'
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(idents, directory, limit):
    """Have workers run all of them, whatever becomes of one."""
    while True:
        done = {result['id'] for result in _read(directory)}
        left = [ident for ident in idents if ident not in done]
        if not left:
            return
        with open(directory / 'log', 'ab') as log:
            worker = subprocess.Popen(
                [sys.executable, '-m', 'tests.novafunctional.worker',
                 str(directory), str(limit)], stdin=subprocess.PIPE,
                stderr=log, env={
                    **os.environ, 'OS_TEST_TIMEOUT': str(limit),
                    'OS_STDOUT_CAPTURE': '1', 'OS_STDERR_CAPTURE': '1',
                    'PYTHONWARNINGS': 'ignore'})

        def stop(number, _frame):
            sys.exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        try:
            worker.communicate('\n'.join(left).encode())
        except SystemExit:
            # It has hosts to remove.
            worker.terminate()
            worker.wait()
            raise
        if len(_read(directory)) == len(done):
            raise SystemExit(
                f'the tests do not run ({worker.returncode}): '
                f'see {directory}/log')


def main():
    parser = argparse.ArgumentParser(prog='tools/nova-functional.sh')
    parser.add_argument('patterns', nargs='*', metavar='REGEX',
                        help='tests to run; all of the list by default')
    parser.add_argument('--list', action='store_true',
                        help='say which tests would run')
    parser.add_argument('--table', type=pathlib.Path, metavar='FILE',
                        help='write the table of the documentation')
    parser.add_argument('--results', type=pathlib.Path, metavar='DIRECTORY',
                        default='nova-functional',
                        help='where results and logs of failures go')
    parser.add_argument('--resume', action='store_true',
                        help='run what has no result there yet')
    parser.add_argument('--limit', type=int, default=_LIMIT,
                        metavar='SECONDS', help='for one test')
    args = parser.parse_args()
    idents = _selected(args.patterns)
    if args.list:
        print('\n'.join(idents))
        return
    if not args.resume and args.results.exists():
        shutil.rmtree(args.results)
    args.results.mkdir(parents=True, exist_ok=True)
    _run(idents, args.results, args.limit)
    chosen = set(idents)
    verdict = results.Verdict(
        [result for result in _read(args.results) if result['id'] in chosen],
        results.Expected())
    print(verdict.summary())
    if args.table is not None:
        args.table.write_text(verdict.table())
    sys.exit(0 if verdict.good else 1)


if __name__ == '__main__':
    main()
