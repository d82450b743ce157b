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

"""What the results of Nova's tests say, and the table of them."""

import collections
import fnmatch
import pathlib

PREFIX = 'nova.tests.functional.'
HERE = pathlib.Path(__file__).parent


def _lines(path):
    for line in path.read_text().splitlines():
        line = line.strip()
        if line and not line.startswith('#'):
            yield line


def classes(path=HERE / 'classes.txt'):
    """The classes of the list, without Nova's package."""
    return list(_lines(path))


class Expected:
    """Failures that are no defects of this driver, each with its reason."""

    def __init__(self, path=HERE / 'expected.txt'):
        self._reasons = {}
        for line in _lines(path):
            pattern, found, reason = line.partition(': ')
            if not found or not reason.strip():
                raise ValueError(f'{path}: no reason: {line}')
            self._reasons[pattern] = reason.strip()

    def patterns(self):
        return list(self._reasons)

    def reason(self, ident):
        """Why it fails, or None: it has to pass."""
        short = ident.removeprefix(PREFIX)
        for pattern, reason in self._reasons.items():
            if fnmatch.fnmatchcase(short, pattern):
                return reason
        return None


class Verdict:
    """Results, compared with what was expected.

    :param results: dictionaries with ``id``, ``outcome`` and ``reason``
    """

    def __init__(self, results, expected):
        self.passed = []
        #: id → the expected reason.
        self.expected = {}
        #: id → what the test says.
        self.unexpected = {}
        #: Failed once, and does no more.
        self.mended = []
        self.skipped = {}
        for result in results:
            ident = result['id'].removeprefix(PREFIX)
            reason = expected.reason(ident)
            if result['outcome'] == 'skipped':
                self.skipped[ident] = result['reason']
            elif result['outcome'] == 'passed':
                (self.passed if reason is None else self.mended).append(ident)
            elif reason is None:
                self.unexpected[ident] = result['reason']
            else:
                self.expected[ident] = reason

    @property
    def good(self):
        return not self.unexpected and not self.mended

    def summary(self):
        words = [f'EXPECTED FAILURE {ident}: {reason}'
                 for ident, reason in self.expected.items()]
        words += [f'SKIPPED {ident}: {reason}'
                  for ident, reason in self.skipped.items()]
        words += [f'PASSED, BUT WAS TO FAIL {ident}' for ident in self.mended]
        words += [f'FAILED {ident}: {reason}'
                  for ident, reason in self.unexpected.items()]
        words.append(
            f'{len(self.passed)} passed, {len(self.expected)} failed as '
            f'expected, {len(self.skipped)} skipped, '
            f'{len(self.unexpected)} failed, '
            f'{len(self.mended)} passed unexpectedly')
        return '\n'.join(words)

    def table(self):
        """The page's table: a row for each class."""
        rows = collections.defaultdict(lambda: ([], {}))
        for ident in self.passed + self.mended:
            rows[_class(ident)][0].append(ident)
        for reasons in (self.expected, self.unexpected, self.skipped):
            for ident, reason in reasons.items():
                rows[_class(ident)][1].setdefault(reason, []).append(ident)
        lines = ['.. Written by tools/nova-functional.sh --table; do not '
                 'edit.', '',
                 f'{len(self.passed) + len(self.mended)} of '
                 f'{sum(len(r[0]) + _count(r[1]) for r in rows.values())} '
                 'tests passed.', '',
                 '.. list-table::', '   :header-rows: 1',
                 '   :widths: 40 10 10 60', '',
                 '   * - class', '     - passed', '     - failed',
                 '     - why']
        for name in sorted(rows):
            passed, reasons = rows[name]
            lines += [f'   * - ``{name}``', f'     - {len(passed)}',
                      f'     - {_count(reasons)}']
            words = [f'{_names(idents)}: {reason}'
                     for reason, idents in reasons.items()]
            lines.append('     - ' + '\n\n       '.join(words))
        return '\n'.join(line.rstrip() for line in lines) + '\n'


def _class(ident):
    return ident.rpartition('.')[0]


def _count(reasons):
    return sum(len(idents) for idents in reasons.values())


def _names(idents):
    return ', '.join(f'``{ident.rpartition(".")[2]}``' for ident in idents)
