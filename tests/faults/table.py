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


"""The results as reStructuredText."""

import dataclasses


@dataclasses.dataclass
class Part:
    """One table of a matrix.

    :ivar faults: what a column is called, by the name of a fault
    """

    name: str
    title: str
    steps: list[str]
    faults: dict[str, str]


def _cell(result):
    if result is None:
        return ''
    if 'broken' in result:
        return '**broken**'
    return result['outcome'] or '–'


def _table(part, results):
    columns = [name for name in part.faults
               if any((part.name, step, name) in results
                      for step in part.steps)]
    yield '.. list-table::'
    yield '   :header-rows: 1'
    yield '   :stub-columns: 1'
    yield ''
    yield '   * - step'
    for name in columns:
        yield f'     - {part.faults[name]}'
    for step in part.steps:
        cells = [results.get((part.name, step, name)) for name in columns]
        if not any(cells):
            continue
        yield f'   * - ``{step}``'
        for cell in cells:
            yield f'     - {_cell(cell)}'.rstrip()
    yield ''


def render(command, parts, results, rows):
    """:param command: that writes it
    :param results: (part, step, fault) → what was found
    :param rows: all keys that there are
    """
    known = [results[row] for row in rows if row in results]
    idle = sum(1 for r in known if 'broken' not in r and not r['outcome'])
    broken = sum(1 for r in known if 'broken' in r)
    lines = [
        f'.. Written by {command} --table; do not edit.', '',
        f'{len(known)} of {len(rows)} rows were tried. In {idle} there was '
        f'nothing to break; {len(known) - idle} faults were injected, and '
        f'{broken} broke a promise.', '']
    settled = [r['settled'] for r in known if 'settled' in r]
    if settled:
        lines += [
            f'In {len(settled)} of them programs were killed, and it was '
            'measured how long it then took, from the start of an agent on, '
            f'until all was right again: {max(settled)} s at most.', '']
    for part in parts:
        if not any(key[0] == part.name for key in results):
            continue
        lines += [part.title, '-' * len(part.title), '']
        lines += _table(part, results)
    return '\n'.join(lines)
