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

from tests.faults import rig

_TITLES = {
    'move': 'Stop and copy',
    'post-copy': 'Post-copy',
    'life': 'One host: define, prepare, start, delete',
    'suspend': 'One host: suspend, resume',
}


def _cell(result):
    if result is None:
        return ''
    if 'broken' in result:
        return '**broken**'
    return result['outcome'] or '–'


def _table(mode, results):
    faults = rig.faults(mode)
    columns = [name for name in faults
               if any((mode, step, name) in results
                      for step in rig.steps(mode))]
    yield '.. list-table::'
    yield '   :header-rows: 1'
    yield '   :stub-columns: 1'
    yield ''
    yield '   * - step'
    for name in columns:
        yield f'     - {faults[name].title}'
    for step in rig.steps(mode):
        cells = [results.get((mode, step, name)) for name in columns]
        if not any(cells):
            continue
        yield f'   * - ``{step}``'
        for cell in cells:
            yield f'     - {_cell(cell)}'.rstrip()
    yield ''


def render(results):
    """:param results: (mode, step, fault) → what a worker has answered"""
    lines = ['.. Written by python -m tests.faults --table; do not edit.', '']
    for mode in rig.MODES:
        if not any(key[0] == mode for key in results):
            continue
        lines += [_TITLES[mode], '-' * len(_TITLES[mode]), '']
        lines += _table(mode, results)
    return '\n'.join(lines)
