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


"""The steps of the package, from its own source.

Nobody has to remember to add a new one to the matrix.
"""

import ast
import pathlib
import typing

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / 'nova_pycontainer'


#: Not passed by a container that is made, moved and deleted. tests/runtime
#: has files of their own for them.
_OTHER_VERBS = frozenset(f'runtime/{name}.py' for name in (
    'checkpoint', 'interfaces', 'migration/cold', 'quiesce', 'rescue',
    'snapshots', 'volume_swap', 'volumes'))


class Step(typing.NamedTuple):
    """A moment at which something may go wrong.

    :param module: where it is, relative to the package
    :param kind: ``point`` of :mod:`nova_pycontainer.runtime.faults`, or
        ``step`` of a reverter
    """

    name: str
    module: str
    line: int
    kind: str

    @property
    def group(self):
        """Who has to pass it: a migration, a container's start and end, one
        of the runtime's other verbs, or one of Nova's.
        """
        if self.module in _OTHER_VERBS:
            return 'verbs'
        if not self.module.startswith('runtime/'):
            return 'driver'
        if self.module.startswith('runtime/migration/'):
            return 'migration'
        return 'life'


class UnknownName(Exception):
    """A step's name is not written where the step is."""


def _names(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return _names(node.body) + _names(node.orelse)
    raise UnknownName(ast.unparse(node))


def _kind(call):
    function = call.func
    if not isinstance(function, ast.Attribute) or not call.args:
        return None
    if function.attr == 'step':
        return 'step'
    if function.attr == 'point' and isinstance(
            function.value, ast.Name) and function.value.id == 'faults':
        return 'point'
    return None


def _forwards(module, call):
    """The two that hand on the name that they were given."""
    return (module, ast.unparse(call.func)) in (
        ('runtime/revert.py', 'faults.point'), ('steps.py', 'super().step'))


def in_module(path):
    module = str(path.relative_to(PACKAGE))
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call) and (kind := _kind(node)):
            if _forwards(module, node):
                continue
            for name in _names(node.args[0]):
                yield Step(name, module, node.lineno, kind)


def listed(group=None):
    """All steps, in the order of the source.

    :param group: only those of one group, see :attr:`Step.group`
    :raises UnknownName: of a step nobody can say what it is called
    """
    found = [step for path in sorted(PACKAGE.rglob('*.py'))
             for step in in_module(path)]
    found.sort(key=lambda s: (s.module, s.line))
    return [s for s in found if group in (None, s.group)]


def names(group):
    """Each name once, in the order of the source."""
    return list(dict.fromkeys(s.name for s in listed(group)))
